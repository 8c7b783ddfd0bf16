"""A scale that is driven is put back and held; any other is not touched."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stabmon
from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.cap_scale import CapScale
from stabmon.records import StabilityIssue
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    look,
    make_run,
    run_of,
    scores_of,
    train_step,
)


def driven(run: TrainingRun, layer: str, times: float) -> StabilityIssue:
    """Two readings, between which the layer's scale became ``times`` as large; the alarm of it."""
    since = run.step
    run.module(layer).scaling *= times
    run.step += 1
    look(run, run.inputs)
    return replace(growth(layer, by="scale", since_step=since), head=None)


def test_scores_are_what_they_were_in_every_forward_and_undone_to_every_bit() -> None:
    run = run_of("llama-sdpa", steps=2)
    layer, other = list(run.layers)
    scale, scores = run.module(layer).scaling, scores_of(run)
    issue = driven(run, layer, 5.0)
    before = all_bits(run)
    applied = CapScale().apply(run, issue)
    assert scores_of(run)[layer] == pytest.approx(scores[layer], rel=1e-5)
    assert applied.record["before"] == {f"{layer}.scaling": pytest.approx(5 * scale)}
    assert applied.record["after"] == {f"{layer}.scaling": pytest.approx(scale)}
    assert run.module(layer).scaling == 5 * scale
    assert applied.undo() is True
    assert differences(before, all_bits(run)) == []
    applied = CapScale().apply(run, issue)
    for _ in range(3):
        run.module(layer).scaling *= 1.1
        run.module(other).scaling *= 1.1
        train_step(run)
        look(run, run.inputs)
        assert run.history.info[layer].scale == pytest.approx(scale)
        assert run.history.info[other].scale == run.module(other).scaling
    assert run.module(other).scaling == pytest.approx(scale * 1.1**3)
    assert applied.effect.was_active()
    assert not applied.effect.was_active()
    applied.release()
    assert run.module(layer).scaling == pytest.approx(scale)
    run.module(layer).scaling *= 1.1
    train_step(run)
    assert run.module(layer).scaling == pytest.approx(1.1 * scale)


class Driven(nn.Module):
    """Attention whose scores are multiplied, or divided, by a number of its own under any name."""

    def __init__(self, number: float | torch.Tensor, *, divides: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.eps, self.dyn, self.divides = 1e-6, number, divides
        self.used: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        times = 1 / self.dyn if self.divides else self.dyn
        self.used.append(float(times))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=float(times / 8**0.5))
        return self.o(y.transpose(1, 2).flatten(-2)) + self.eps


class Stack(nn.Module):
    def __init__(self, number: float | torch.Tensor = 1.0, *, divides: bool = False) -> None:
        super().__init__()
        self.first, self.second = (Driven(number, divides=divides) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x + self.first(x))


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_the_number_is_found_whatever_it_is_called(divides: bool, kind: str) -> None:
    make = float if kind == "float" else torch.tensor
    run = make_run(Stack(make(1.0), divides=divides), {"x": torch.randn(2, 6, 16)}, steps=1)
    scores, since = scores_of(run), run.step
    for each in (run.model.first, run.model.second):
        each.dyn = make(0.125 if divides else 8.0)
    run.step += 1
    look(run, run.inputs)
    issue = replace(growth("first", by="scale", since_step=since), head=None)
    before, own = all_bits(run), run.model.first.dyn
    applied = CapScale().apply(run, issue)
    assert list(applied.record["after"]) == ["first.dyn"]
    assert scores_of(run)["first"] == pytest.approx(scores["first"], rel=1e-5)
    assert run.model.first.dyn is own
    applied.undo()
    assert differences(before, all_bits(run)) == []
    assert scores_of(run)["first"] == pytest.approx(8 * scores["first"], rel=1e-5)


def test_a_loop_that_writes_the_scale_at_each_step_trains_and_evaluates_under_the_cap(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, config="guard", log_every=5, run_dir=tmp_path, sinks=["jsonl"]
    ) as monitor:
        for step in range(1, 121):
            for each in (model.first, model.second):
                each.dyn = 1.05 ** max(0, step - 40)
            loss = model(torch.randn(4, 6, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.on_step(loss)
        assert not monitor.errors
        assert [each.intervention.name for each in monitor.applied if each.active] == [
            "skip_step",
            "cap_scale",
        ]
        cap = model.first.used[-1]
        assert model.first.used[-10:] == [cap] * 10
        assert cap < 2 < model.first.dyn
        with torch.no_grad():
            model.eval()(torch.randn(4, 6, 16))
        assert model.first.used[-1] == cap
    assert model.first.dyn == pytest.approx(cap)
    assert not model.first._forward_pre_hooks


def test_copies_of_a_model_take_no_cap_along() -> None:
    run = run_of("llama-sdpa", steps=2)
    layer = first_layer(run)
    issue = driven(run, layer, 5.0)
    _ = CapScale().apply(run, issue)
    twin = copy.deepcopy(run.model)
    module = dict(twin.named_modules())[layer]
    module.scaling = 123.0
    twin(**run.inputs)
    run.model = twin
    run.layers = {}
    look(run, run.inputs)
    assert run.history.info[layer].scale == 123.0


@pytest.mark.parametrize("model", ["llama-sdpa", "bert-sdpa", "gpt2-sdpa"])
def test_weights_that_are_driven_are_not_for_it(model: str) -> None:
    run = run_of(model, steps=2)
    with pytest.raises(NotApplicable, match="no issue shows that the scale"):
        CapScale().apply(run, growth(first_layer(run), by="weights", since_step=1))


def test_a_module_without_a_scale_of_its_own_is_told() -> None:
    run = run_of("transformer_encoder", steps=2)
    with pytest.raises(NotApplicable, match="holds no scale"):
        CapScale().apply(
            run, replace(growth(first_layer(run), by="scale", since_step=run.step), head=None)
        )


def test_a_number_of_that_name_that_is_something_else_is_left_alone() -> None:
    run = run_of("llama-sdpa", steps=2)
    issue = driven(run, first_layer(run), 2.0)
    run.module(first_layer(run)).scaling = 64.0
    with pytest.raises(NotApplicable, match="not the one that was measured"):
        CapScale().apply(run, issue)
    assert run.module(first_layer(run)).scaling == 64.0


def test_it_is_held_again_after_a_restart() -> None:
    first = run_of("llama-sdpa", steps=2)
    layer = first_layer(first)
    state = CapScale().apply(first, driven(first, layer, 3.0)).state_dict()
    run = run_of("llama-sdpa", steps=2)
    scale = run.module(layer).scaling
    CapScale().resume(run, json.loads(json.dumps(state)))
    run.module(layer).scaling *= 3
    look(run, run.inputs)
    assert run.history.info[layer].scale == pytest.approx(scale)
    assert run.module(layer).scaling == pytest.approx(3 * scale)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cap"):
        CapScale(cap=0.0)
