"""The overflow of exponentials without the row's maximum subtracted is foretold, per head."""

import math
from dataclasses import replace

import numpy as np
import pytest

from stabmon.rules import History
from stabmon.rules.overflow_risk import OverflowRisk
from tests.support.trajectories import LAYERS, info, readings, run, shape, signals

LIMIT = {"float16": math.log(65504), "float32": math.log(np.finfo(np.float32).max)}


def exponentials(scores: np.ndarray, dtype: str = "float32", noise: float = 0.0, every: int = 10):
    """Readings of heads whose exponentials reach the scores of a curve in their format."""
    used = shape(np.asarray(scores, dtype=float) / LIMIT[dtype], noise)
    plain = signals(used * LIMIT[dtype], shape(np.full(len(scores), 0.5)))
    return readings(
        plain | {"exp_range": used},
        every=every,
        layer_info=replace(info(fused=False), exp_dtype=dtype),
    )


def first_alarm(given) -> int | None:
    alarms = [each.step for each in run(given, [OverflowRisk()]) if each.is_alarm]
    return min(alarms, default=None)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("share", "severity"),
    [(0.49, None), (0.51, "warning"), (0.74, "warning"), (0.76, "error"), (1.01, "critical")],
)
def test_a_level_score_is_judged_by_its_share_of_the_range(dtype, share, severity):
    given = run(exponentials(np.full(12, share * LIMIT[dtype]), dtype), [OverflowRisk()])
    assert {each.severity for each in given} == ({severity} if severity else set())


@pytest.mark.parametrize("every", [1, 5, 50])
@pytest.mark.parametrize("growth", [1.0, 2.0, 4.0])
def test_a_score_that_grows_to_the_end_is_alarmed_before_it_whatever_its_pace(every, growth):
    """At a constant number of nats a reading, as scores do under a constant rate."""
    scores = 4 + growth * np.arange(90)
    onset = int(np.flatnonzero(scores >= LIMIT["float32"])[0] + 1) * every
    alarm = first_alarm(exponentials(scores, noise=0.05, every=every))
    assert alarm is not None
    assert 0.35 * onset < alarm < 0.85 * onset


@pytest.mark.parametrize("level", [10.0, 30.0, 42.0])
def test_a_score_that_settles_below_half_of_the_range_is_no_alarm(level):
    steps = np.arange(80)
    scores = level * (1 - np.exp(-steps / 10)) + 1
    assert first_alarm(exponentials(scores, noise=0.08)) is None


def test_a_sudden_score_near_the_end_is_an_alarm_without_a_forecast():
    scores = np.array([*[4.0] * 7, 9.0])
    assert first_alarm(exponentials(scores, "float16")) == 80


def test_the_alarm_says_when_and_names_the_mend():
    (*_, alarm) = (
        each
        for each in run(exponentials(4 + 5.0 * np.arange(10)), [OverflowRisk()])
        if each.is_alarm and each.head == 0 and each.layer == LAYERS[0]
    )
    assert alarm.evidence["exp_dtype"] == "float32"
    assert alarm.evidence["limit"] == pytest.approx(88.72, abs=0.01)
    left = (LIMIT["float32"] - alarm.evidence["max_logit"]) / 5 * 10
    assert 0.4 * left < alarm.eta_steps < left  # scores are taken to grow exponentially
    low, high = alarm.evidence["eta_interval"]
    assert low <= alarm.eta_steps <= high
    assert "use torch.softmax, or subtract scores.amax(-1, keepdim=True)" in alarm.suggestion
    words = OverflowRisk.describe([alarm], "loop")
    assert words.code == "weights = torch.softmax(scores, dim=-1)"
    assert "overflows at 88.7" in words.numbers


def test_attention_by_a_softmax_has_no_such_limit():
    given = readings(signals(shape(np.full(12, 200.0)), shape(np.full(12, 0.2))))
    assert run(given, [OverflowRisk()]) == []


def test_the_newest_share_is_the_value_of_an_open_issue():
    given = exponentials(np.full(12, 80.0))
    (first, *_) = run(given, [OverflowRisk()])
    history = History()
    for reading in given:
        history.add(reading)
    assert OverflowRisk.value_now(first, history) == pytest.approx(80 / LIMIT["float32"])
