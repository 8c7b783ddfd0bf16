"""A scale that is driven is put back and held; any other is not touched."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.cap_scale import CapScale
from stabmon.records import StabilityIssue
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    look,
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


def test_the_scale_is_what_it_was_and_held_and_scores_with_it_and_undone_to_every_bit() -> None:
    run = run_of("llama-sdpa", steps=2)
    layer, other = list(run.layers)
    scale, scores = run.module(layer).scaling, scores_of(run)
    issue = driven(run, layer, 5.0)
    before = all_bits(run)
    applied = CapScale().apply(run, issue)
    assert run.module(layer).scaling == scale
    assert scores_of(run)[layer] == pytest.approx(scores[layer], rel=1e-5)
    assert applied.record["before"] == {f"{layer}.scaling": pytest.approx(5 * scale)}
    assert applied.undo() is True
    assert differences(before, all_bits(run)) == []
    applied = CapScale().apply(run, issue)
    for _ in range(3):
        run.module(layer).scaling *= 1.1
        run.module(other).scaling *= 1.1
        train_step(run)
        assert run.module(layer).scaling == scale
    assert run.module(other).scaling == pytest.approx(scale * 1.1**3)
    assert applied.effect.was_active()
    assert not applied.effect.was_active()
    applied.release()
    run.module(layer).scaling *= 1.1
    train_step(run)
    assert run.module(layer).scaling == pytest.approx(1.1 * scale)


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
    CapScale().resume(run, state)
    run.module(layer).scaling *= 3
    run.step_hooks.fire("on_step")
    assert run.module(layer).scaling == pytest.approx(scale)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cap"):
        CapScale(cap=0.0)
