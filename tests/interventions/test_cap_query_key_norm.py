"""Weights that are driven come back to their norm, piece by piece; what is not driven is not
touched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.cap_query_key_norm import CapQueryKeyNorm
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.projections.head_rows import Rows
from stabmon.projections.locate import find_query_key
from stabmon.records import QKUpdate, StabilityIssue
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    run_of,
    train_step,
)

MODELS = ["gpt2-sdpa", "llama-sdpa", "bert-sdpa", "gemma3-sdpa", "transformer_encoder"]


def pieces(run: TrainingRun, layer: str | None = None) -> list[Rows]:
    layer = layer or first_layer(run)
    return find_query_key(run.module(layer), run.history.info.get(layer))[0].all_rows()


def norms(run: TrainingRun) -> list[float]:
    return [
        (piece.offset + piece.view(piece.parameter).detach()).norm().item() for piece in pieces(run)
    ]


def whole(run: TrainingRun) -> float:
    """As a reading tells it, of the parameters themselves."""
    return (
        torch.cat([piece.view(piece.parameter).detach().flatten() for piece in pieces(run)])
        .norm()
        .item()
    )


@torch.no_grad()
def multiply(run: TrainingRun, factor: float, only: type[nn.Parameter] | int | None = None) -> None:
    for piece in pieces(run):
        if only is None or piece.parameter.ndim == only:
            view = piece.view(piece.parameter)
            view.copy_((piece.offset + view) * factor - piece.offset)


def driven(run: TrainingRun, **evidence: Any) -> StabilityIssue:
    return replace(
        growth(first_layer(run), since_step=run.step, by="weights", **evidence), head=None
    )


def with_state(model: str) -> TrainingRun:
    """A run with a healthy state behind it, whose norms the history knows."""
    run = run_of(model, steps=2)
    run.prepared = [HealthyStates(run, every=1, confirm=0)]
    run.prepared[0].offer(True)
    run.prepared[0].offer(True)
    run.history.readings[-1] = replace(
        run.history.latest,
        query_key={first_layer(run): QKUpdate(1.0, whole(run), 0.01 * whole(run))},
    )
    return run


@pytest.mark.parametrize("model", MODELS)
def test_what_was_multiplied_comes_back_to_its_share_of_the_healthy_state_and_undone_to_every_bit(
    model: str,
) -> None:
    run = with_state(model)
    healthy, issue = norms(run), driven(run)
    multiply(run, 3.0)
    before = all_bits(run)
    applied = CapQueryKeyNorm(least=0.0).apply(run, issue)
    assert norms(run) == pytest.approx([1.4 * norm for norm in healthy], rel=1e-5)
    changed = {
        name
        for name in differences(before, all_bits(run))
        if not name.startswith(("state", "group"))
    }
    own = {id(piece.parameter) for piece in pieces(run)}
    assert changed <= {name for name, p in run.model.named_parameters() if id(p) in own}
    assert applied.undo() is True
    assert differences(before, all_bits(run)) == []


def test_a_piece_that_was_driven_alone_is_brought_back_alone() -> None:
    run = with_state("bert-sdpa")
    with torch.no_grad():
        for piece in pieces(run):
            if piece.parameter.ndim == 1:
                piece.view(piece.parameter).fill_(0.05)
    run.prepared[0].offer(True)
    run.history.readings[-1] = replace(
        run.history.latest,
        query_key={first_layer(run): QKUpdate(1.0, whole(run), 0.01 * whole(run))},
    )
    issue, healthy = driven(run), norms(run)
    multiply(run, 50.0, only=1)
    CapQueryKeyNorm().apply(run, issue)
    now = norms(run)
    for piece, norm, was in zip(pieces(run), now, healthy, strict=True):
        if piece.parameter.ndim == 2:
            assert norm == was, "its weights were not driven"
        else:
            assert norm <= max(1.4 * was, 1.4 * 0.1 * whole(run) * 2)


@pytest.mark.parametrize("model", MODELS)
def test_it_is_held_through_what_goes_on_driving(model: str) -> None:
    run = with_state(model)
    before = whole(run)
    applied = CapQueryKeyNorm().apply(run, driven(run))
    for _ in range(30):
        multiply(run, 1.2)
        train_step(run)
        run.optimizer.zero_grad()
    assert whole(run) <= 1.41 * before + 0.2 * before
    assert applied.effect.was_active()
    applied.release()
    multiply(run, 1.2)
    train_step(run)
    assert whole(run) > 1.1 * 1.2 * before


def test_what_stays_below_is_trained_as_without_it() -> None:
    free, held = with_state("llama-sdpa"), with_state("llama-sdpa")
    applied = CapQueryKeyNorm(times=100.0).apply(held, driven(held))
    for run in (free, held):
        torch.manual_seed(0)
        train_step(run)
    assert differences(all_bits(free), all_bits(held)) == []
    assert not applied.effect.was_active()


def test_without_a_healthy_state_growth_ends_where_it_is() -> None:
    run = run_of("gpt2-sdpa", steps=2)
    now = norms(run)
    CapQueryKeyNorm().apply(run, driven(run))
    assert norms(run) == now
    multiply(run, 2.0)
    run.step_hooks.fire("on_step")
    assert norms(run) == pytest.approx(now, rel=1e-5)


def test_a_scale_that_grows_is_not_for_it() -> None:
    run = run_of("gpt2-sdpa", steps=2)
    before = all_bits(run)
    with pytest.raises(NotApplicable, match="scale"):
        CapQueryKeyNorm().apply(run, replace(driven(run), evidence={"by": "scale"}))
    assert differences(before, all_bits(run)) == []


def test_it_is_held_again_after_a_restart() -> None:
    first = with_state("gpt2-sdpa")
    state = CapQueryKeyNorm().apply(first, driven(first)).state_dict()
    run = run_of("gpt2-sdpa", steps=2)
    CapQueryKeyNorm().resume(run, state)
    before = whole(run)
    multiply(run, 5.0)
    run.step_hooks.fire("on_step")
    assert whole(run) <= 1.6 * before


@pytest.mark.parametrize("bad", [{"times": 0}, {"least": 2.0}, {"times": "much"}])
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CapQueryKeyNorm(**bad)
