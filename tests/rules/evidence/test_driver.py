"""A rate or a scale that rose before attention changed is named, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stabmon.records import LayerInfo, Reading
from stabmon.rules import History
from stabmon.rules.evidence.driver import driver_of

STEPS = range(5, 201, 5)
FACTS = LayerInfo(2, 8, 0.5, "float32")


def history_of(rates: dict[str, list[float]], scales: list[float] | None = None) -> History:
    """A run whose score doubles in the last 20 steps."""
    history = History()
    for at, step in enumerate(STEPS):
        score = 4.0 if step <= 180 else 10.0
        facts = FACTS if scales is None else replace(FACTS, scale=scales[at])
        history.add(
            Reading(
                step,
                None,
                {"attn": {"max_logit": np.array([score, score / 2])}},
                info={"attn": facts},
                learning_rates={key: each[at] for key, each in rates.items()},
                query_key_groups=("0.1",),
            )
        )
    return history


FLAT = [1e-3] * len(STEPS)
RAMP = [1e-3 * 1.2 ** max(0, at - 30) for at in range(len(STEPS))]


@pytest.mark.parametrize(
    ("rates", "by"),
    [
        ({"0.0": RAMP}, "rate"),
        ({"0.0": RAMP, "0.1": RAMP}, "rate"),
        ({"0.0": FLAT, "0.1": RAMP}, "query_key"),
    ],
)
def test_a_rate_that_rises_is_named_with_the_value_that_fitted(
    rates: dict[str, list[float]], by: str
) -> None:
    found = driver_of(history_of(rates), "attn")
    assert found is not None
    assert found.by == by
    assert found.times == pytest.approx(RAMP[-1] / 1e-3)
    assert found.fits == pytest.approx(RAMP[list(STEPS).index(180)])
    assert f"{found.fits:.2g}" in found.advice
    assert ("of W_q and W_k" in found.advice) == (by == "query_key")


def test_a_slow_ramp_that_goes_on_is_held_against_when_attention_was_well() -> None:
    history = History()
    for at, step in enumerate(STEPS):
        score = np.array([4.0 if at < 10 else 10.0])
        rates = {"0.0": 1e-3 * 1.0175**at}
        history.add(Reading(step, None, {"attn": {"max_logit": score}}, learning_rates=rates))
    found = driver_of(history, "attn")
    assert found is not None
    assert (found.by, found.since) == ("rate", 50)
    assert found.times == pytest.approx(1.0175**30)


@pytest.mark.parametrize(
    "rates",
    [
        FLAT,
        [1e-3 * min(1, step / 50) for step in STEPS],  # a warm-up that is long over
        [1e-3 * (1 + np.cos(step / 64)) for step in STEPS],
        [1e-3 * (1 + step / 400) for step in STEPS],
    ],
)
def test_schedules_that_stand_still_fall_or_hardly_rise_are_not(rates: list[float]) -> None:
    assert driver_of(history_of({"0.0": rates}), "attn") is None


def test_a_scale_that_rises_is_named_before_a_rate() -> None:
    scales = [0.5 if step <= 150 else 1.0 for step in STEPS]
    found = driver_of(history_of({"0.0": RAMP}, scales), "attn")
    assert found is not None
    assert (found.by, found.times, found.since, found.fits) == ("scale", 2.0, 150, 0.5)
    assert "cap_scale" in found.advice
