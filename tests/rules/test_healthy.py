"""Healthy runs that look suspicious give no alarm under any rule."""

import numpy as np
import pytest

from tests.support.sweeps import sweep
from tests.support.trajectories import alarms, falling_loss, info, readings, run, shape, signals


def gradient_norms(count: int, seed: int) -> list[dict[str, float]]:
    """Heavy-tailed norms, one in thirty several times the usual."""
    rng = np.random.default_rng(seed)
    whole = np.exp(0.3 * rng.standard_normal(count)) * np.where(
        rng.random(count) < 1 / 30, 6.0, 1.0
    )
    return [
        {"": float(g), "blocks.0.attention": float(0.3 * g), "blocks.1.attention": float(0.2 * g)}
        for g in whole
    ]


def pretrained(seed):
    """Near one-hot heads with scores near 300 from the first reading on."""
    count = 80
    return signals(
        shape(np.full(count, 291.0), 0.1, seed), shape(np.full(count, 0.05), 0.2, seed + 1)
    )


def sinks(seed):
    """Low-entropy heads with most mass on the first key, formed within 40 steps."""
    count = 80
    out = signals(shape(np.full(count, 9.0), 0.1, seed), shape(np.full(count, 0.3), 0.05, seed + 1))
    out["sink_mass"] = shape(0.05 + 0.8 / (1 + np.exp(-(np.arange(count) - 20.0))), 0.02, seed)
    return out


def induction(seed):
    """Copy heads that turn one-hot within 60 steps while the loss falls by half."""
    turn = 1 / (1 + np.exp(-(np.arange(80) - 30) / 1.5))
    return signals(
        shape(6 * 5**turn, 0.08, seed), shape(0.85 * 0.12**turn, 0.06, seed + 1), shape(0.3 * turn)
    )


def warm_up(seed):
    """From a flat fresh model to scores of 30."""
    curve = 30 / (1 + np.exp(-(np.arange(80) - 14) / 3.0)) + 0.2
    return signals(shape(curve, 0.08, seed), shape(1 - 0.6 * curve / 30, 0.03, seed + 1))


def short_context(seed):
    """Few keys: noisy entropies and saturated shares."""
    return signals(
        shape(np.full(80, 8.0), 0.2, seed), np.clip(shape(np.full(80, 0.35), 0.3, seed + 1), 0, 1)
    )


STEADY = [(course, every) for course in (pretrained, sinks, short_context) for every in (1, 10, 50)]
LEARNING = [(induction, 10), (warm_up, 10), (induction, 20), (warm_up, 50)]
"""Courses that change are drawn at ten steps a reading; read as fewer steps they would be faster
than anything learns.
"""


@pytest.mark.parametrize("seed", sweep(range(4), keep=2))
@pytest.mark.parametrize(("course", "every"), STEADY + LEARNING)
def test_a_healthy_course_gives_no_alarm(course, every, seed):
    start = (
        2.1 if course is pretrained else 5.5
    )  # what has been trained before has little left to lose
    loss = falling_loss(80 * every, start=start, scale=20 * every, seed=seed)
    watched = readings(course(seed), losses=loss, every=every, gradients=gradient_norms(80, seed))
    assert not alarms(run(watched))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_pretrained_model_in_half_precision_gives_no_alarm(dtype, fused):
    watched = readings(
        pretrained(0), losses=falling_loss(800, start=2.1), layer_info=info(dtype, fused=fused)
    )
    assert not alarms(run(watched))


@pytest.mark.parametrize("seed", range(4))
def test_new_data_in_mid_run_gives_no_alarm(seed):
    """The loss jumps from 2.5 to 5.9 and comes down again over the next hundred steps, as when the
    corpus changes.
    """
    before, after = (
        falling_loss(200, end=2.5, scale=40, seed=seed),
        falling_loss(200, start=5.9, end=2.8, scale=18, seed=seed + 1),
    )
    loss = np.concatenate([before, after])
    score, entropy = shape(np.full(40, 15.0), 0.08, seed), shape(np.full(40, 0.5), 0.05, seed + 1)
    score[20:] *= 0.8
    watched = readings(signals(score, entropy), losses=loss, gradients=gradient_norms(40, seed))
    assert not alarms(run(watched))
