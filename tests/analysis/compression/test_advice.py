"""Attention to kept keys against dense rows; advice on models whose needs are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from stabmon.analysis.compression.advice import compression_advice
from stabmon.analysis.compression.key_choices import (
    AllKeys,
    DiverseKeys,
    GroupedKeys,
    KeyChoice,
    RandomKeys,
    RecentKeys,
    TopKeys,
)
from stabmon.analysis.compression.loss_trial import LossTrial
from stabmon.analysis.compression.restricted_attention import restricted_attention
from stabmon.analysis.patterns.api import attention_patterns
from stabmon.operator import attention_operator

B, H, KV, S, D = 2, 4, 2, 24, 8
PADDED = 5


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, and a causal mask in which the second sample is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, heads, S, D, generator=generator) for heads in (H, KV, KV))
    mask = torch.ones(S, S).tril().bool().expand(B, 1, S, S).clone()
    mask[1, :, :, :PADDED] = False
    return 2 * query, key, value, mask


def softmax_over(logits: np.ndarray, sink: float) -> np.ndarray:
    top = max(logits.max(), sink)
    weights = np.exp(logits - top)
    return weights / (weights.sum() + math.exp(sink - top))


def expected_keys(
    choice: KeyChoice, b: int, i: int, logits: np.ndarray, key: np.ndarray
) -> set[int]:
    """The single keys that row i of sample b keeps; ``logits`` of its visible keys."""
    first = PADDED if b else 0
    visible = list(range(first, i + 1))
    n = len(visible)
    if n <= choice.keep:
        return set(visible)
    if isinstance(choice, RecentKeys):
        newest = choice.keep - choice.sinks
        return set(visible[: choice.sinks]) | set(visible[-newest:])
    if isinstance(choice, TopKeys):
        return {visible[j] for j in np.argsort(logits)[-choice.keep :]}
    if isinstance(choice, GroupedKeys):
        old = visible[: n - choice.keep // 2]
        merged = (old[-1] + 1) // choice.size * choice.size
        return {j for j in visible if j >= merged}
    assert isinstance(choice, DiverseKeys)
    newest = choice.keep - choice.keep // 2
    interval = max(1, choice.keep // 4)
    now = i - i % interval
    old = [j for j in visible if j <= now - newest]
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    mean = unit[old].sum(0) if old else np.zeros(D)
    alike = [unit[j] @ mean / np.linalg.norm(mean) for j in old]
    order = np.argsort(alike)[: choice.keep // 2]
    return set(visible[-newest:]) | {old[j] for j in order}


CHOICES = [
    RecentKeys(6),
    RecentKeys(7, 3),
    TopKeys(5),
    DiverseKeys(8),
    GroupedKeys(8, 3),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
def test_attention_to_kept_keys_equals_dense_rows(choice: KeyChoice) -> None:
    query, key, value, mask = parts()
    sinks = torch.linspace(-1, 1, H)
    attention = attention_operator(
        query, key, scale=0.5, mask=mask, softcap=4.0, sinks=sinks, is_self=True
    )
    found = restricted_attention(attention, value, choice, elements=B * H * S * 7).numpy()
    q, k, v = (x.double().numpy() for x in (query, key, value))
    for b in range(B):
        first = PADDED if b else 0
        for h in range(H):
            keys, values = k[b, h // 2], v[b, h // 2]
            for i in range(first, S):
                visible = np.arange(first, i + 1)
                score = 4 * np.tanh(0.5 * keys[visible] @ q[b, h, i] / 4)
                kept = expected_keys(choice, b, i, score, keys)
                columns = [j for j in visible if j in kept]
                logits, rows = [score[j - first] for j in columns], [values[j] for j in columns]
                if isinstance(choice, GroupedKeys):
                    rest = [j for j in visible if j not in kept]
                    for start in range(0, S, choice.size):
                        group = [j for j in range(start, start + choice.size) if j in rest]
                        if group:
                            mean = keys[group].mean(0)
                            logit = 4 * np.tanh(0.5 * mean @ q[b, h, i] / 4)
                            logits.append(logit + math.log(len(group)))
                            rows.append(values[group].mean(0))
                p = softmax_over(np.array(logits), float(sinks[h]))
                np.testing.assert_allclose(found[b, h, i], p @ np.array(rows), atol=1e-5)


def test_random_keys_are_so_many_and_the_same_each_time() -> None:
    query, key, value, mask = parts()
    attention = attention_operator(query, key, scale=0.5, mask=mask, is_self=True)
    before = torch.get_rng_state()
    one = restricted_attention(attention, value, RandomKeys(6, seed=1))
    assert torch.equal(one, restricted_attention(attention, value, RandomKeys(6, seed=1)))
    assert not torch.equal(one, restricted_attention(attention, value, RandomKeys(6, seed=2)))
    assert torch.equal(torch.get_rng_state(), before)
    kept = RandomKeys(6).kept(slice(0, S), mask, torch.zeros(B, H, S, S))
    seen = mask.sum(-1)
    assert torch.equal(kept.sum(-1), seen.clamp(max=6))
    assert kept[0, 0].diagonal().all()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    return model


def test_the_loss_is_the_models_own_under_a_band_mask() -> None:
    model, keep = llama(), 9
    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    trial = LossTrial(model, {"input_ids": ids}, None, 0)
    losses = trial._losses(RecentKeys(keep))
    place = torch.arange(40)
    band = (place[:, None] >= place) & (place[:, None] - place < keep)
    mask = torch.where(band, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 40, 40)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, :-1]
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(losses.flatten(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trial._losses(AllKeys()), trial._losses(None), atol=1e-4, rtol=1e-4)
    cost = trial.cost("keep_recent", keep, RecentKeys(keep))
    with torch.no_grad():
        full = model(ids).logits[:, :-1]
    whole = nn.functional.cross_entropy(full.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    touched = (expected - whole).view(2, 39)[:, keep:]
    assert cost.n == touched.numel() == 60
    assert cost.rise == pytest.approx(float(touched.mean()), abs=1e-4)
    assert cost.by_sample == pytest.approx(touched.mean(1).tolist(), abs=1e-4)


TOKENS, LENGTH = 8, 64


def copier(scores: Tensor) -> GPT2LMHeadModel:
    """One head that attends by position and predicts the token that it looks at."""
    width = 80
    sizes = {"vocab_size": TOKENS, "n_embd": width, "n_positions": LENGTH, "n_head": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, n_layer=1, n_inner=4)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        block, mean = model.transformer.h[0], 2 / width
        model.transformer.wte.weight[:, :TOKENS] = torch.eye(TOKENS)
        model.transformer.wpe.weight[:, 16:] = torch.eye(LENGTH)
        block.ln_1.weight[:], block.ln_1.bias[:] = (mean - mean**2) ** 0.5, mean
        block.attn.c_attn.weight[16:, 16:width] = scores * width**0.5
        block.attn.c_attn.weight[16:, width + 16 : 2 * width] = torch.eye(LENGTH)
        block.attn.c_attn.weight[:TOKENS, 2 * width : 2 * width + 8] = torch.eye(TOKENS)
        block.attn.c_proj.weight[:8, 8:16] = torch.eye(8)
        model.transformer.ln_f.weight[8:16] = 1.0
        model.lm_head.weight = nn.Parameter(torch.zeros(TOKENS, width))
        model.lm_head.weight[:, 8:16] = 0.5 * torch.eye(8)
    return model


def alternating(kind: str) -> Tensor:
    """Two tokens in turn, or three times of four the first token and else a random one."""
    ids = torch.randint(0, TOKENS, (6, LENGTH), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = torch.arange(6)
    for i in range(1, LENGTH):
        if kind == "first":
            ids[:, i] = ids[:, 0] if i % 4 else ids[:, i]
        elif i >= 2:
            ids[:, i] = ids[:, i - 2]
    return ids


def test_a_model_that_needs_recent_keys_only_is_told_so() -> None:
    model = copier(30.0 * torch.eye(LENGTH).roll(-1, 1).tril())
    advice = compression_advice(model, {"input_ids": alternating("two before")})
    best = advice.recommendations[0]
    assert (best.policy, best.keep, best.context) == ("keep_recent", 8, LENGTH)
    assert abs(best.cost) < 1e-5
    assert best.random_cost > 0.1
    assert best.n == 6 * (LENGTH - 1 - 8)
    assert "8 newest keys, of a context of 64" in best.text


def test_a_model_that_needs_its_first_key_is_not_told_to_drop_it() -> None:
    scores = torch.zeros(LENGTH, LENGTH)
    scores[:, 0] = 30.0
    found = attention_patterns(copier(scores), {"input_ids": alternating("first")})
    policies = {each.policy: each for each in found.recommendations}
    assert "keep_recent" not in policies
    assert "keep_recent_and_sinks" in policies
    assert abs(policies["keep_recent_and_sinks"].cost) < 1e-5
    assert "top_k" in policies
    refused = [each for each in found.rejected if each.policy == "keep_recent"]
    assert [each.keep for each in refused] == [8, 16, 32]
    assert all("more than 0.01" in each.reason and each.cost > 0.01 for each in refused)
    record = found.to_record()
    assert record.values["rejected"][0]["cost"] == found.rejected[0].cost


class ByHand(nn.Module):
    """A causal language model that writes its softmax out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        scores = self.q(x) @ self.k(x).mT / 4
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ x) @ self.embed.weight.T


def test_what_cannot_be_measured_gets_no_advice_and_a_reason() -> None:
    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    )
    cases: list[tuple[Any, Any, str]] = [
        (bert, {"input_ids": ids}, "not causal"),
        (llama().model, {"input_ids": ids}, "no logits"),
        (llama(), {"input_ids": ids[:, :12]}, "give a longer text"),
        (ByHand(), {"input_ids": ids}, "by hand"),
    ]
    for model, batch, reason in cases:
        advice = compression_advice(model, batch)
        assert not advice.recommendations
        assert not advice.rejected
        assert reason in advice.notes[0]


def test_a_loss_of_ones_own_is_measured() -> None:
    model = llama()
    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"inputs_embeds": model.model.embed_tokens(ids).detach()}
    advice = compression_advice(
        model, batch, loss_fn=lambda output, _: output.logits.square().mean(-1)
    )
    tried = advice.recommendations + advice.rejected
    assert {each.policy for each in tried} >= {"keep_recent", "top_k", "diverse", "grouping"}
    with pytest.raises(ValueError, match="loss_fn must return"):
        compression_advice(model, batch, loss_fn=lambda output, _: 1.0)


def test_advice_that_nobody_asked_for_fails_in_words() -> None:
    ids = torch.randint(3, 50, (1, 40), generator=torch.Generator().manual_seed(0))

    def broken(output: Any, batch: Any) -> Tensor:
        raise RuntimeError("out of\nmemory")

    model, batch = llama(), {"input_ids": ids}
    found = attention_patterns(model, batch, loss_fn=broken)
    assert found.roles
    assert found.notes == ["no compression advice: measuring it failed (out of memory)"]
    with pytest.raises(RuntimeError, match="out of"):
        attention_patterns(model, batch, loss_fn=broken, advice=True)
    asked = attention_patterns(model, batch, advice=False)
    assert not asked.notes
