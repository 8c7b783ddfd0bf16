"""The readings as arrays: late layers, missing signals, own baselines, bounded length, exact
resume.
"""

import json

import numpy as np
import pytest

from stabmon.records import Reading, StabilityIssue
from stabmon.rules import History
from tests.support.trajectories import LAYERS, falling_loss, readings, shape, signals


def reading(step, layers, **more):
    return Reading(
        step,
        None,
        {name: {"max_logit": np.array(v, dtype=float)} for name, v in layers.items()},
        **more,
    )


def filled(count=7, **options):
    history = History(**options)
    for r in readings(
        signals(shape(np.arange(1.0, count + 1)), shape(np.full(count, 0.5))),
        losses=falling_loss(10 * count),
    ):
        history.add(r)
    return history


def test_a_late_layer_is_nan_before_and_a_missing_one_is_nan_where_it_is_missing():
    history = History()
    for r in (
        reading(1, {"a": [1, 2]}),
        reading(2, {"a": [3, 4], "b": [5]}),
        reading(3, {"b": [6]}),
    ):
        history.add(r)
    np.testing.assert_array_equal(
        history.signal("max_logit"), [[1, 2, np.nan], [3, 4, 5], [np.nan, np.nan, 6]]
    )
    assert history.heads == [("a", 0), ("a", 1), ("b", 0)]
    assert history.of_layer("b") == slice(2, 3)
    assert not history.seen("a", 0)
    assert history.seen("b", 0)
    assert history.seen("mlp", None)


def test_a_signal_that_comes_late_is_nan_before_and_an_unknown_one_everywhere():
    history = filled(3)
    history.add(Reading(40, None, {LAYERS[0]: {"new": np.ones(4)}}))
    assert history.signal("new").shape == (4, 8)
    assert np.isnan(history.signal("new")[:3]).all()
    assert np.isnan(history.now("never")).all()
    assert np.isnan(history.baseline("never")).all()


def test_the_baseline_is_the_median_of_each_heads_first_finite_values_and_outlives_them():
    history = History(length=4, baseline_length=3)
    for step, values in enumerate(
        [[1, np.nan], [9, 5], [2, 7], [100, 6], [100, 100], [100, 100], [100, 100]]
    ):
        history.add(reading(step + 1, {"a": values}))
        if step == 2:
            np.testing.assert_array_equal(history.baseline("max_logit"), [2, np.nan])
    np.testing.assert_array_equal(history.baseline("max_logit"), [2, 6])


@pytest.mark.parametrize("count", [3, 4, 5, 8, 9, 25])
def test_only_the_newest_readings_are_kept(count):
    history = filled(count, length=4)
    np.testing.assert_array_equal(
        history.signal("max_logit")[:, 0], np.arange(max(1, count - 3), count + 1)
    )
    assert len(history) == len(history.steps) == min(count, 4)


def test_gradients_and_losses_are_arrays_over_readings_and_steps():
    history = History()
    history.add(Reading(1, 3.0, {}, gradients={"": 2.0}))
    history.add(
        Reading(3, 2.0, {}, gradients={"": 1.0, "a": 0.5}, losses=((2, float("nan")), (3, 2.0)))
    )
    np.testing.assert_array_equal(history.gradients("a"), [np.nan, 0.5])
    np.testing.assert_array_equal(history.gradients(""), [2.0, 1.0])
    np.testing.assert_array_equal(history.gradients("unknown"), [np.nan, np.nan])
    np.testing.assert_array_equal(history.recent_losses, [[1, 3.0], [3, 2.0]])


def test_open_issues_tell_their_level_until_they_are_older_than_the_history():
    history = filled(6, length=4)
    issue = StabilityIssue(60, LAYERS[0], 2, "logit_growth", "error", 90.0, 40.0, "Do.")
    history.set_open([(issue, 60)])
    assert np.flatnonzero(history.is_open("logit_growth")).tolist() == [2]
    assert history.open_level("logit_growth")[2] == 40.0
    assert history.is_open_at("logit_growth", LAYERS[0], 2)
    assert not history.is_open_at("logit_growth")
    history.set_open([(issue, 10)])
    assert history.is_open("logit_growth")[2]
    assert np.isnan(history.open_level("logit_growth")).all()


def test_state_comes_back_bit_for_bit_through_json():
    history = filled(9, length=6)
    again = History(length=6)
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for name in ("max_logit", "normalized_entropy"):
        np.testing.assert_array_equal(again.signal(name), history.signal(name))
        np.testing.assert_array_equal(again.baseline(name), history.baseline(name))
    assert again.losses == history.losses
    assert again.info == history.info
    assert again.heads == history.heads
    for one, other in zip(again.readings, history.readings, strict=True):
        assert (one.step, one.loss, one.losses) == (other.step, other.loss, other.losses)
        np.testing.assert_equal(
            {k: dict(v) for k, v in one.layers.items()},
            {k: dict(v) for k, v in other.layers.items()},
        )


def test_a_state_of_another_baseline_is_refused():
    with pytest.raises(ValueError, match="use the same baseline_length"):
        History(baseline_length=3).load_state_dict(filled(9).state_dict())


def test_after_a_rollback_the_course_that_was_left_is_no_past():
    history, twin = filled(12, length=6), filled(9, length=6)
    steps = history.steps.tolist()
    assert len(steps) == 6
    history.rolled_back(steps[2])
    assert history.steps.tolist() == steps[:3]
    assert max(step for step, _ in history.losses) <= steps[2]
    for name in ("max_logit", "normalized_entropy"):
        assert history.signal(name).shape[0] == 3
        np.testing.assert_array_equal(history.signal(name), twin.signal(name)[-3:])
        np.testing.assert_array_equal(history.baseline(name), twin.baseline(name))
    assert history.count == 12
    resumed = History(length=6)
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.count == 12
    for each in (history, resumed):
        each.add(reading(200, {LAYERS[0]: [9.0] * 4}))
        assert each.steps.tolist() == [*steps[:3], 200]
        assert each.signal("max_logit").shape[0] == 4
    history.rolled_back(0)
    assert len(history) == 0
    assert np.isnan(history.now("max_logit")).all()
    assert history.recent_losses.shape == (0, 2)
