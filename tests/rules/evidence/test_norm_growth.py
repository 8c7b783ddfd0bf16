"""Scores that something other than learning makes grow are told long before they do harm, and what
learns is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stabmon.records import QKUpdate, Reading
from stabmon.rules import History
from stabmon.rules.evidence.norm_growth import sustained_growth
from stabmon.rules.logit_growth import LogitGrowth
from tests.support.sweeps import sweep
from tests.support.trajectories import (
    LAYERS,
    alarms,
    falling_loss,
    info,
    readings,
    run,
    shape,
    signals,
)


def watched(
    weight: np.ndarray,
    share: np.ndarray | float,
    score: np.ndarray,
    *,
    scale: np.ndarray | float = 1.0,
    every: int = 5,
) -> list[Reading]:
    """Readings of which the first layer's W_q and W_k have the norm ``weight`` and move by
    ``share`` of it a step.
    """
    count = len(weight)
    share, scale = np.broadcast_to(share, count), np.broadcast_to(scale, count)
    values = shape(np.full(count, 5.0), 0.02)
    values[:, 0, 2] = score
    plain = readings(
        signals(values, shape(np.full(count, 0.6), 0.02)),
        losses=falling_loss(count * every),
        every=every,
    )
    return [
        replace(
            each,
            query_key={
                LAYERS[0]: QKUpdate(1.0, float(weight[t]), float(weight[t] * share[t])),
                LAYERS[1]: QKUpdate(1.0, 4.0, 0.08),
            },
            info={
                LAYERS[0]: replace(info(), scale=info().scale * float(scale[t])),
                LAYERS[1]: info(),
            },
        )
        for t, each in enumerate(plain)
    ]


def multiplied(
    factor: float, *, start: int = 20, count: int = 60, every: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Norm, and score, of weights that are multiplied by ``factor`` at each step from the reading
    ``start`` on.
    """
    grown = factor ** (every * np.maximum(0, np.arange(count) - start))
    return 4.0 * grown, 6.0 * grown**2


@pytest.mark.parametrize("every", [1, 5, 20, 50])
@pytest.mark.parametrize("factor", sweep([1.012, 1.06, 1.03], keep=2))
def test_weights_that_are_multiplied_are_told_by_their_layer_before_the_scores_are_large(
    factor: float, every: int
) -> None:
    weight, score = multiplied(factor, every=every, count=80)
    found = alarms(
        run(
            watched(weight, np.where(weight > 4, factor - 1, 0.01), score, every=every),
            [LogitGrowth()],
        )
    )
    driven = next(issue for issue in found if issue.evidence["how"] == "driven")
    assert (driven.layer, driven.head, driven.evidence["by"]) == (LAYERS[0], None, "weights")
    assert driven.evidence["coherence"] == pytest.approx(1.0, abs=0.25)
    assert driven.evidence["heads_grown"] == [2]
    assert driven.evidence["since_step"] <= driven.step - 15
    steps = driven.step - 21 * every
    assert steps <= max(3 * every, 16) or factor**steps <= 1.6, (
        "within three readings, or once the score has grown with it"
    )
    assert found[0] is driven or found[0].evidence["how"] == "jump"


def test_a_scale_that_grows_is_told_without_a_word_about_weights() -> None:
    grown = 1.05 ** (5.0 * np.maximum(0, np.arange(40) - 20))
    found = alarms(run(watched(np.full(40, 4.0), 0.02, 6.0 * grown, scale=grown), [LogitGrowth()]))
    assert (found[0].layer, found[0].head, found[0].evidence["by"]) == (LAYERS[0], None, "scale")
    assert found[0].value < 30
    assert "cap_scale" in found[0].suggestion


@pytest.mark.parametrize(
    ("weight", "share", "score"),
    [
        pytest.param(
            4 * np.exp(0.012 * np.arange(60)),
            0.005,
            6 * np.exp(0.03 * np.arange(60)),
            id="a learner, half of whose way",
        ),
        pytest.param(
            *(multiplied(1.03)[0], 0.03, np.full(60, 8.0)),
            id="no score has grown with it, as under a norm",
        ),
        pytest.param(
            *(multiplied(1.03)[0], 0.03, np.minimum(multiplied(1.03)[1], 9.0)),
            id="scores of nothing",
        ),
        pytest.param(
            np.where(np.arange(60) < 20, 4.0, 16.0),
            0.01,
            np.where(np.arange(60) < 20, 6.0, 90.0),
            id="one jump",
        ),
        pytest.param(
            4 * 1.1 ** np.minimum(np.arange(60), 3),
            0.02,
            6 * 1.1 ** np.arange(60),
            id="it has come to an end",
        ),
        pytest.param(
            np.full(60, np.nan),
            np.nan,
            6 * 1.1 ** np.arange(60),
            id="nothing is known of the weights",
        ),
        pytest.param(np.zeros(60), np.nan, 6 * 1.1 ** np.arange(60), id="no weight"),
    ],
)
def test_what_is_no_drive_gives_no_alarm_of_a_layer(
    weight: np.ndarray, share: float | np.ndarray, score: np.ndarray
) -> None:
    found = alarms(run(watched(weight, share, score), [LogitGrowth()]))
    assert [issue for issue in found if issue.head is None] == []


def history_of(each: Sequence[Reading]) -> History:
    history = History()
    for reading in each:
        history.add(reading)
    return history


def test_it_closes_when_the_growth_has_been_stopped() -> None:
    weight, score = multiplied(1.04, count=50)
    weight, score = np.minimum(weight, weight[30]), np.minimum(score, score[30])
    found = run(watched(weight, np.where(np.arange(50) < 20, 0.01, 0.04), score), [LogitGrowth()])
    states = [issue.state for issue in found if issue.layer == LAYERS[0] and issue.head is None]
    assert (states[0], states[-1], states.count("closed")) == ("opened", "closed", 1)


def test_too_few_steps_or_readings_tell_nothing() -> None:
    weight, score = multiplied(1.2, start=0, count=9, every=1)
    each = watched(weight, 0.2, score, every=1)
    assert sustained_growth(history_of(each), LAYERS[0]) is None
    assert sustained_growth(history_of(each[:1]), LAYERS[0]) is None
    weight, score = multiplied(1.01, start=0, count=9, every=200)
    assert sustained_growth(history_of(watched(weight, 0.01, score, every=200)), LAYERS[0]) is None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_weights_that_learn_turn_more_than_they_grow(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    """A real layer that learns to attend to one key of many at a high rate: its scores grow
    manifold, and nothing drives it.
    """
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    query_key = layer.in_proj_weight
    made = optimizer(layer.parameters(), lr=0.3 if optimizer is torch.optim.SGD else 3e-3)
    history, steps, first = History(), 150, None
    for step in range(1, steps + 1):
        x = torch.randn(16, 24, 32)
        out, _ = layer(x, x, x)
        loss = (out - x.roll(1, dims=1)).square().mean() - out.square().mean().clamp(max=0.5)
        made.zero_grad()
        loss.backward()
        before = query_key.detach()[:64].clone()
        made.step()
        moved, norm = (query_key.detach()[:64] - before).norm().item(), before.norm().item()
        first = first or norm
        if step % 5 == 0:
            history.add(
                Reading(
                    step,
                    loss.item(),
                    {"a": {}},
                    {"a": replace(info(), heads=4)},
                    query_key={"a": QKUpdate(1.0, norm, moved)},
                )
            )
            assert sustained_growth(history, "a") is None
    assert moved > 0
