"""An act over several layers does to each what it does to that layer alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stabmon.interventions import Intervention, NotApplicable
from stabmon.interventions.increase_dropout import IncreaseDropout
from stabmon.interventions.logit_softcap import LogitSoftcap
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.run.score_replay import replayed_scores
from stabmon.interventions.soften_logits import SoftenLogits
from tests.support.intervention_runs import all_bits, differences, growth, make_run, run_of
from tests.support.small_runs import Attention
from tests.support.sweeps import sweep


def sharp(name: str) -> object:
    """A run whose heads attend sharply, so that what one layer does is seen in the next."""
    run = run_of(name)
    with torch.no_grad():
        for parameter in (
            p for module in run.layers.values() for p in module.parameters() if p.ndim == 2
        ):
            parameter.mul_(30)
    return run


@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2-sdpa", "llama-sdpa", "t5-sdpa"])
@pytest.mark.parametrize("backwards", sweep([True, False], keep=1))
def test_all_layers_are_softened_at_once_and_put_back_to_the_bit(
    name: str, backwards: bool
) -> None:
    run = sharp(name)
    layers = [layer for layer in replayed_scores(run) if "#" not in layer]
    before, alone = all_bits(run), {}
    for layer in layers:
        try:
            applied = SoftenLogits().apply(run, growth(layer))
        except NotApplicable:
            continue
        alone[layer] = dict(applied.record["after"])
        assert applied.undo()
    assert differences(before, all_bits(run)) == []
    if not alone:
        pytest.skip("this model holds no scale")
    act = SoftenLogits().aimed_at(
        [growth(layer) for layer in (reversed(layers) if backwards else layers)]
    )
    applied = act.apply(run)
    assert applied.record["after"] == {
        name: value for each in alone.values() for name, value in each.items()
    }
    assert applied.record["note"].count("left out") == len(layers) - len(alone)
    assert applied.undo()
    assert differences(before, all_bits(run)) == []


class Scaled(Attention):
    """Attention that says it has a scale, and reads it or not."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.num_heads, self.scaling, self.attention_dropout, self.reads = 4, 0.35, 0.1, reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        scale, dropout = (self.scaling, self.attention_dropout) if self.reads else (0.35, 0.1)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scale, dropout_p=dropout
        )
        return self.o(mixed.transpose(1, 2).flatten(-2))


class Mixed(nn.Module):
    """Three layers, of which the second reads nothing of what it says it has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = Scaled(True), Scaled(False), Scaled(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c):
            x = x + 9 * layer(x)
        return x


@pytest.mark.parametrize("act", [SoftenLogits(), IncreaseDropout()])
def test_a_layer_that_does_not_fit_is_left_out_alone_and_named(act: Intervention) -> None:
    run = make_run(
        Mixed(), {"x": torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))}
    )
    before = all_bits(run)
    applied = act.aimed_at([growth(layer) for layer in "abc"]).apply(run)
    assert [layer for layer, _ in applied.record["places"]] == ["a", "c"]
    note = applied.record["note"]
    assert note.count("left out") == 1
    assert "b (Scaled) holds no scale" in note or "of b does" in note
    assert applied.undo()
    with pytest.raises(NotApplicable, match=r"\bb (does not|\(Scaled\) holds no scale)"):
        act.apply(run, growth("b"))
    assert differences(before, all_bits(run)) == []


def test_softcaps_are_set_where_they_can_be() -> None:
    run = run_of("gemma2-eager")
    layers = list(run.layers)
    run.layers[layers[0]].attn_logit_softcapping = 0.25
    cap = run.layers[layers[1]].attn_logit_softcapping / 2
    applied = LogitSoftcap(cap=cap).aimed_at([growth(layer) for layer in layers]).apply(run)
    assert [layer for layer, _ in applied.record["places"]] == layers[1:]
    assert f"left out: {layers[0]} caps its scores at 0.25 already" in applied.record["note"]


def test_layers_that_attend_in_another_order_than_they_are_named_in_are_clipped_each_by_itself() -> (
    None
):
    run = sharp("llama-sdpa")
    before = replayed_scores(run)
    aim = min(float(each.min()) for each in before.values()) / 3
    issues = [
        growth(layer, head)
        for layer in reversed(list(before))
        for head in range(len(before[layer]))
    ]
    applied = QkClip(target=aim, hold=False).aimed_at(issues).apply(run)
    assert "left out" not in applied.record["note"]
    first = next(iter(before))
    np.testing.assert_allclose(replayed_scores(run)[first], aim, rtol=1e-4)
