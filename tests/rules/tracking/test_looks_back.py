"""Ranks that keep only what rules look at find what others find."""

import json
from typing import Any

import numpy as np
import pytest

from stabmon.config import load_config
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.monitor_parts import make_tracker
from stabmon.records import LayerInfo, Reading
from stabmon.rules.base import Rule
from stabmon.rules.logit_growth import LogitGrowth
from stabmon.rules.tracking.history_table import WIDE
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.signals import SIGNALS

LAYERS, HEADS = 2, WIDE // 2 + 1
INFO = {
    "a": LayerInfo(HEADS, 64, 0.125, "float16", fused=False),
    "b": LayerInfo(HEADS, 64, 0.125, "bfloat16", exp_dtype="float32", fused=False),
}


def reading(step: int) -> Reading:
    """Return a reading in which a few heads do everything that rules look for, at some time."""
    rng = np.random.default_rng(step)
    values = {}
    for layer in INFO:
        drawn = {name: rng.lognormal(0, 0.1, HEADS) for name in SIGNALS}
        drawn |= {name: 0.5 * drawn[name] for name in ("normalized_entropy", "max_probability")}
        drawn["saturated_fraction"] = 0.01 * drawn["saturated_fraction"]
        drawn["max_logit"] *= 8
        drawn["precision_bits"] *= 4
        drawn["exp_range"] *= 0.1
        if step > 20:
            for name in SIGNALS:  # each head in one way, growing since step 20
                drawn[name][rng.integers(0, 40, 12)] *= 1.1 ** (step - 20)
            drawn["max_logit"][40:44] *= 1.3 ** (step - 20)
            drawn["normalized_entropy"][40:44] /= 1.3 ** (step - 20)
        values[layer] = drawn
    return Reading(step, 3 / step, values, info=INFO, gradients={"": 1.0, "a": 0.5, "b": 1e-9})


def trackers(**overrides: Any) -> tuple[IssueTracker, IssueTracker]:
    config = load_config("observe", log_every=1, history=40, **overrides)
    return tuple(make_tracker(config, ErrorBoundary(), is_shown=each) for each in (True, False))


def test_a_rank_that_keeps_less_finds_the_same_issues() -> None:
    shown, other = trackers()
    kinds = set()
    for step in range(1, 52):
        if step == 43:  # and after a resume from the whole state
            state = json.loads(json.dumps(shown.state_dict()))
            shown.load_state_dict(state)
            other.load_state_dict(state)
        left, right = shown.update(reading(step)), other.update(reading(step))
        assert list(map(repr, left)) == list(map(repr, right)), step
        assert shown.risks == other.risks
        kinds |= {issue.issue_type for issue in left}
    assert kinds >= {
        *("logit_growth", "entropy_collapse", "attention_spike", "high_curvature"),
        *("precision_insufficient", "overflow_risk"),
    }
    assert shown.history.steps.tolist() == other.history.steps.tolist()
    kept = sum(np.isfinite(other.history.signal(name)).sum() for name in SIGNALS)
    assert kept < 0.5 * sum(np.isfinite(shown.history.signal(name)).sum() for name in SIGNALS)
    assert np.isnan(other.history.baseline("sink_mass")).all()
    assert [bool(each.layers) for each in other.history.readings] == [False] * 39 + [True]
    assert other.history.readings[-1].layers["b"].keys() == shown.history.latest.layers["b"].keys()


def test_a_rule_that_declares_nothing_has_the_whole_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LogitGrowth, "looks_back", Rule.looks_back)
    _, other = trackers()
    for step in range(1, 4):
        other.update(reading(step))
    assert np.isfinite(other.history.signal("sink_mass")).all()


def test_a_model_of_few_heads_is_kept_whole_on_all_ranks() -> None:
    _, other = trackers()
    for step in range(1, 4):
        other.update(Reading(step, 1.0, {"a": {"sink_mass": np.array([0.5, 0.5])}}))
    assert np.isfinite(other.history.signal("sink_mass")).all()
    assert all(each.layers for each in other.history.readings)


def test_a_reading_between_samples_takes_nothing_from_what_is_kept() -> None:
    shown, other = trackers()
    for step in range(1, 31):
        for each in (shown, other):
            each.update(reading(step))
            each.update(Reading(step, 1.0, {}, sampled=False))
    recent = slice(-12, -1)  # of 11 samples the probability's rise is judged
    np.testing.assert_array_equal(
        shown.history.rows("sink_mass", recent), other.history.rows("sink_mass", recent)
    )
