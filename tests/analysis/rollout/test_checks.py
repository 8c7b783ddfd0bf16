"""Deletions against models whose answer hangs on known tokens; generation step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabmon.analysis.attribution.faithfulness import deletion_check
from stabmon.analysis.attribution.generation import generation_attribution
from stabmon.analysis.rollout.api import attention_rollout
from tests.support import rollout_models as models


class Counter(nn.Module):
    """Says class 1 the more surely the more tokens 9 there are; attends so that its rollout can be
    taken.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attend = (
            nn.Embedding(20, 8),
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        self.attend(self.embed(input_ids))
        count = (input_ids == 9).sum(1).float()
        return torch.stack([torch.zeros_like(count), count], dim=1)


def counted() -> tuple[Tensor, Tensor]:
    tokens = torch.full((3, 10), 4)
    for index, places in enumerate(([1, 2], [5, 8], [3, 9])):
        tokens[index, places] = 9
    return tokens, (tokens == 9).float()


def test_taking_the_tokens_that_matter_drops_the_prediction() -> None:
    tokens, right = counted()
    found = deletion_check(
        Counter(), {"input_ids": tokens}, right, k=[1, 2], replacement=4, targets=0, draws=20
    )
    log_p = torch.tensor([0.0, 1.0, 2.0]).sigmoid().log()
    assert found.way == "replaced by token 4"
    for effect, left in zip(found.effects, (1, 0), strict=True):
        assert effect.top_drop == pytest.approx(float(log_p[2] - log_p[left]), abs=1e-6)
        assert effect.top_std == pytest.approx(0.0, abs=1e-6)
        assert 0 < effect.random_drop < effect.top_drop
        assert effect.better_than_random > 0.7
    wrong = deletion_check(
        Counter(), {"input_ids": tokens}, 1 - right, k=2, replacement=4, targets=0, draws=20
    )
    assert wrong.effects[0].top_drop == pytest.approx(0.0, abs=1e-6)
    assert wrong.effects[0].better_than_random < 0.5


def test_draws_are_seeded_and_leave_the_random_state_alone() -> None:
    (tokens, right), model = counted(), Counter()
    state = torch.get_rng_state()
    batch = {"input_ids": tokens}
    one, same, other = (
        deletion_check(
            model, batch, right, k=2, replacement=4, targets=0, draws=3, seed=seed
        ).effects[0]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one.random_drop != other.random_drop
    assert torch.equal(torch.get_rng_state(), state)


def test_hidden_tokens_are_as_absent() -> None:
    case = models.bert()
    seen: list[Tensor] = []
    scores = torch.arange(11.0).expand(3, -1)

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            seen.append(attention_mask)
            return self.model(input_ids=input_ids, attention_mask=attention_mask)

    found = deletion_check(Seen(), case.batch, scores, k=2, targets=[0, 0, 0], draws=1)
    assert found.way == "hidden from attention"
    assert seen[1][0].tolist() == [1] * 9 + [0, 0]
    rollout = attention_rollout(case.model, case.batch, targets=0)
    with_rollout = deletion_check(case.model, case.batch, rollout, k=3, draws=2)
    assert with_rollout.effects[0].samples == 3
    record = rollout.to_record(faithfulness=with_rollout.to_values())
    assert record.values["faithfulness"]["effects"][0]["k"] == 3


def test_patches_are_taken_from_images() -> None:
    case = models.vit()
    rollout = attention_rollout(case.model, case.batch, targets=0)
    whole = deletion_check(case.model, case.batch, rollout, k=16, draws=2)
    flat = case.batch["pixel_values"].mean((2, 3), keepdim=True).expand(-1, -1, 32, 32)
    with torch.no_grad():
        before = case.model(**case.batch).logits.log_softmax(-1)
        after = case.model(pixel_values=flat).logits.log_softmax(-1)
    top = before.argmax(-1, keepdim=True)
    drop = (before.gather(1, top) - after.gather(1, top)).mean()
    assert whole.effects[0].top_drop == pytest.approx(float(drop), abs=1e-5)
    assert whole.effects[0].random_drop == pytest.approx(float(drop), abs=1e-5)


def test_refuses_inputs_that_nothing_can_be_taken_from() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    with pytest.raises(ValueError, match="give replacement="):
        deletion_check(model, torch.randn(2, 5, 8), torch.rand(2, 5))
    with pytest.raises(ValueError, match="give at least 1"):
        deletion_check(Counter(), counted()[0], counted()[1], k=0)


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_generated_tokens_step_by_step(make: Any) -> None:
    case = make()
    case.model.generation_config.eos_token_id = None
    case.model.config.eos_token_id = None
    found = generation_attribution(case.model, case.batch, max_new_tokens=3)
    assert found.tokens.shape == (3, 14)
    assert found.rollout.matrix.shape == (3, 3, 14)
    assert bool(found.generated.all())
    mask = case.batch.get("attention_mask", torch.ones(3, 11, dtype=torch.int64))
    for step in range(3):
        length = 11 + step
        seen = torch.cat([mask, torch.ones(3, step, dtype=torch.int64)], dim=1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        batch = {
            "input_ids": found.tokens[:, :length],
            "attention_mask": seen,
            "position_ids": positions,
        }
        alone = attention_rollout(case.model, batch, targets=-1)
        torch.testing.assert_close(
            found.rollout.matrix[:, step, :length], alone.matrix[:, 0], atol=1e-5, rtol=0
        )
        assert float(found.rollout.matrix[:, step, length:].abs().max()) == 0
        with torch.no_grad():
            top = case.model(**batch).logits[:, -1].argmax(-1)
        assert torch.equal(top, found.tokens[:, length])


def test_rows_after_the_end_are_nan() -> None:
    case = models.llama()
    case.model.generation_config.eos_token_id = None
    free = generation_attribution(case.model, case.batch, max_new_tokens=4)
    case.model.generation_config.eos_token_id = int(free.tokens[0, 12])
    case.model.generation_config.pad_token_id = 0
    found = generation_attribution(case.model, case.batch, max_new_tokens=4)
    assert found.generated[0].tolist()[:2] == [True, True]
    assert not bool(found.generated[0, 2:].any())
    assert torch.equal(found.rollout.matrix.isnan().all(-1), ~found.generated)
    torch.testing.assert_close(
        found.rollout.matrix[0, :2, :13], free.rollout.matrix[0, :2, :13], atol=1e-5, rtol=0
    )


def test_generated_tokens_of_an_encoder_decoder_owe_to_the_source() -> None:
    case = models.t5()
    batch = {name: case.batch[name] for name in ("input_ids", "attention_mask")}
    found = generation_attribution(case.model, batch, max_new_tokens=3)
    assert found.prompt_length == 1
    assert found.rollout.matrix.shape[2] == 11
    rows = found.rollout.matrix[found.generated]
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows)), atol=1e-5, rtol=0)
    assert (
        float(found.rollout.matrix[1, :, 7:].nan_to_num().abs().max()) == 0
    )  # padding of the source
    with pytest.raises(ValueError, match="has no generate"):
        generation_attribution(nn.Linear(2, 2), batch)
