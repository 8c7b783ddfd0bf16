"""The dashboard's scalars, worked by hand."""

import numpy as np
import pytest

from stabmon.records import Reading
from stabmon.sinks.scalars import dashboard_scalars
from tests.support.sample_records import issue, reading

NAN, INF = float("nan"), float("inf")


def test_names_and_values_are_those_of_the_contract() -> None:
    layers = {
        "a": {"attention_entropy": np.array([1.0, 3.0]), "max_logit": np.array([5.0, 9.0])},
        "b": {"attention_entropy": np.array([0.5, 1.5]), "max_logit": np.array([-2.0, 4.0])},
    }
    scalars = dashboard_scalars(
        Reading(10, 4.0, layers, overhead_fraction=0.02, risk={"a": 0.02, "b": 0.4}),
        [issue(10), issue(10, head=3)],
        alarms=5,
    )
    assert scalars == {
        "attention/attention_entropy/max": 3.0,
        "attention/attention_entropy/mean": 1.5,
        "attention/attention_entropy/min": 0.5,
        "attention/max_logit/max": 9.0,
        "attention/max_logit/mean": 4.0,
        "attention/max_logit/min": -2.0,
        "attention_layers/a/risk": 0.02,
        "attention_layers/b/risk": 0.4,
        "attention_layers/a/attention_entropy": 2.0,
        "attention_layers/a/max_logit": 9.0,
        "attention_layers/b/attention_entropy": 1.0,
        "attention_layers/b/max_logit": 4.0,
        "stability/risk": 0.4,
        "stability/issues_open": 2.0,
        "stability/alarms": 5.0,
        "stability/overhead_fraction": 0.02,
    }
    assert all(type(value) is float for value in scalars.values())


def test_heads_that_are_not_finite_are_left_out() -> None:
    layers = {
        "a": {"max_logit": np.array([NAN, 2.0, INF])},
        "b": {"max_logit": np.array([NAN, -INF, NAN])},
    }
    scalars = dashboard_scalars(Reading(1, NAN, layers, overhead_fraction=NAN), [], alarms=0)
    assert scalars["attention/max_logit/max"] == scalars["attention/max_logit/min"] == 2.0
    assert scalars["attention_layers/a/max_logit"] == 2.0
    assert "attention_layers/b/max_logit" not in scalars
    assert "stability/overhead_fraction" not in scalars
    assert np.isfinite(list(scalars.values())).all()


def test_a_step_without_any_attention_gives_the_state_of_the_run() -> None:
    assert dashboard_scalars(Reading(1, None, {}), [], alarms=0) == {
        "stability/issues_open": 0.0,
        "stability/alarms": 0.0,
    }


def test_a_signal_nobody_registered_is_averaged_over_heads() -> None:
    scalars = dashboard_scalars(
        Reading(1, None, {"a": {"my_signal": np.array([1.0, 2.0])}}), [], alarms=0
    )
    assert scalars["attention_layers/a/my_signal"] == pytest.approx(1.5)


def test_a_sample_reading_has_three_a_signal_and_one_a_layer_and_signal() -> None:
    assert len(dashboard_scalars(reading(10), [], alarms=0)) == 2 * 3 + 2 * 2 + 3
