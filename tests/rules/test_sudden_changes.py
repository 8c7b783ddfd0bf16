"""Sudden changes of attention and of its curvature are warnings, never alarms."""

import numpy as np
import pytest

from stabmon.rules.attention_spike import AttentionSpike
from stabmon.rules.high_curvature import HighCurvature
from tests.support.trajectories import LAYERS, readings, run, shape


def stepped(name, before, after, noise=0.02):
    values = shape(np.full(20, before), noise)
    values[12:, 1, 0] = after
    return readings({name: values})


@pytest.mark.parametrize("name", ["max_probability", "sink_mass"])
@pytest.mark.parametrize(("after", "anomalous"), [(0.55, False), (0.8, True)])
def test_a_jump_of_a_probability_is_reported_at_its_head(name, after, anomalous):
    found = run(stepped(name, 0.2, after), [AttentionSpike()])
    assert [(i.step, i.layer, i.head, i.severity, i.evidence["signal"]) for i in found] == (
        [(130, LAYERS[1], 0, "warning", name)] if anomalous else []
    )


@pytest.mark.parametrize(("after", "anomalous"), [(5.0, False), (7.0, True)])
def test_a_jump_of_the_curvature_is_reported_at_its_head(after, anomalous):
    found = run(stepped("hnf_log_curvature", 3.0, after), [HighCurvature()])
    assert [(i.step, i.layer, i.head, i.severity) for i in found] == (
        [(130, LAYERS[1], 0, "warning")] if anomalous else []
    )


@pytest.mark.parametrize("rule", [AttentionSpike(), HighCurvature()])
def test_noise_missing_values_and_short_histories_give_nothing(rule):
    for name in ("max_probability", "sink_mass", "hnf_log_curvature"):
        assert not run(readings({name: shape(np.full(60, 0.3), 0.15)}), [rule])
        assert not run(readings({name: np.full((10, 2, 4), np.nan)}), [rule])
        assert not run(stepped(name, 0.2, 9.0)[:2], [rule])
    assert not run(readings({"max_logit": shape(np.full(10, 5.0))}), [rule])
