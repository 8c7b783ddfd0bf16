"""Gradient norms: far above their past with a rising loss, or gone from a layer whose rows
saturated.
"""

import numpy as np
import pytest

from stabmon.rules.gradient_explosion import GradientExplosion
from stabmon.rules.gradient_vanishing import GradientVanishing
from tests.support.trajectories import LAYERS, alarms, readings, run, shape, signals


def norms(whole, own=0.3, other=0.2):
    own, other = np.broadcast_to(own, len(whole)), np.broadcast_to(other, len(whole))
    return [
        {"": float(g), LAYERS[0]: float(a), LAYERS[1]: float(b)}
        for g, a, b in zip(whole, own, other, strict=True)
    ]


def watched(gradients, loss=None, saturated=None):
    count = len(gradients)
    share = shape(np.zeros(count)) if saturated is None else saturated
    loss = (
        2.0 + 0.02 * np.random.default_rng(0).standard_normal(10 * count) if loss is None else loss
    )
    return readings(
        signals(shape(np.full(count, 8.0)), shape(np.full(count, 0.5)), share),
        losses=loss,
        gradients=gradients,
    )


def usual(count=40, seed=0):
    return np.exp(0.2 * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize(("times", "anomalous"), [(6.0, False), (14.0, True)])
def test_one_large_gradient_is_a_warning_beyond_its_level(times, anomalous):
    whole = usual()
    whole[30] = times
    found = run(watched(norms(whole)), [GradientExplosion()])
    assert {i.severity for i in found if i.state == "opened"} == (
        {"warning"} if anomalous else set()
    )


def test_large_gradients_that_stay_while_the_loss_rises_are_an_alarm_that_names_the_layer():
    whole = usual()
    whole[30:] *= 60
    loss = 2.0 + 0.02 * np.random.default_rng(0).standard_normal(400)
    loss[300:] += 0.8
    own = np.where(np.arange(40) >= 30, 90.0, 0.3)
    found = alarms(run(watched(norms(whole, own), loss), [GradientExplosion()]))
    assert [(i.step, i.layer) for i in found] == [(330, None)]
    assert found[0].evidence["layer_grown_most"] == LAYERS[0]


def test_large_gradients_with_a_loss_as_before_are_no_alarm():
    whole = usual()
    whole[30:] *= 60
    assert not alarms(run(watched(norms(whole)), [GradientExplosion()]))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_norms_that_say_nothing_give_nothing(value):
    whole = usual()
    whole[30:] = value
    assert not run(watched(norms(whole)), [GradientExplosion(), GradientVanishing()])


def test_short_histories_and_missing_norms_give_nothing():
    assert not run(
        watched(norms(np.array([1.0, 1.0, 99.0, 99.0]))), [GradientExplosion(), GradientVanishing()]
    )
    assert not run(watched([{}] * 30), [GradientExplosion(), GradientVanishing()])


def vanished(kept, saturated_after, count=40):
    own = np.where(np.arange(count) >= 30, 0.3 * kept, 0.3)
    share = shape(np.full(count, 0.1)).copy()
    share[30:, 0] = saturated_after
    return watched(norms(usual(count), own), saturated=share)


@pytest.mark.parametrize(
    ("kept", "saturated", "severity"),
    [(0.3, 0.9, None), (0.03, 0.9, "error"), (0.03, 0.1, None), (0.005, 0.1, "warning")],
)
def test_a_layers_gradient_vanishes_with_saturated_rows(kept, saturated, severity):
    found = run(vanished(kept, saturated), [GradientVanishing()])
    assert {(i.severity, i.layer, i.head) for i in found} == (
        {(severity, LAYERS[0], None)} if severity else set()
    )


def test_a_model_that_converges_as_a_whole_vanishes_nowhere():
    whole = usual() * np.where(np.arange(40) >= 30, 0.01, 1.0)
    assert not run(watched(norms(whole, 0.3 * whole, 0.2 * whole)), [GradientVanishing()])
