"""Bounds of memory and state for models of very many heads, and what is kept within them."""

import json

import numpy as np
import pytest

from stabmon.records import Reading
from stabmon.rules import History
from stabmon.rules.tracking import size_limits
from stabmon.rules.tracking.history_table import WIDE
from stabmon.rules.tracking.size_limits import LEAST_READINGS, LEAST_STORED, thinned

HEADS = WIDE + 1
NAMES = ("max_logit", "normalized_entropy")


def add(history: History, count: int, first: int = 1) -> None:
    for step in range(first, first + count):
        drawn = np.random.default_rng(step).random((len(NAMES), HEADS))
        history.add(Reading(step, 1.0, {"a": dict(zip(NAMES, drawn, strict=True))}))


def test_values_of_very_many_heads_are_kept_in_seven_digits_and_readings_hold_no_copy() -> None:
    history = History()
    add(history, 3)
    exact = np.random.default_rng(2).random((len(NAMES), HEADS))[0]
    assert history.signal("max_logit").dtype == np.float32
    np.testing.assert_allclose(history.signal("max_logit")[1], exact, rtol=1e-6)
    values = history.readings[1].layers["a"]["max_logit"]
    np.testing.assert_array_equal(values, history.signal("max_logit")[1])
    assert values.base is not None, "a view of the row"
    small = History()
    small.add(Reading(1, 1.0, {"a": {"max_logit": np.array([1 / 3])}}))
    assert small.signal("max_logit")[0, 0] == 1 / 3


def test_memory_is_bounded_however_many_heads_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_limits, "MOST_BYTES", 60 * HEADS * 4 * len(NAMES))
    history = History()
    add(history, 80)
    assert len(history) == len(history.signal("max_logit")) == len(history.gradients("")) == 60
    assert history.steps.tolist() == list(range(21, 81))
    assert not history.has_first
    monkeypatch.setattr(size_limits, "MOST_BYTES", 1)
    add(history, 1, first=81)
    assert len(history) == LEAST_READINGS


def test_a_state_is_bounded_and_keeps_the_newest_and_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(size_limits, "MOST_STORED_BYTES", 1)
    history, again = History(), History()
    add(history, 40)
    state = json.loads(json.dumps(history.state_dict()))
    again.load_state_dict(state)
    assert len(again) == LEAST_STORED
    assert again.steps.tolist()[0] == 1
    assert again.steps.tolist()[-4:] == [37, 38, 39, 40]
    assert again.has_first
    assert again.count == 40
    rows = np.isin(history.steps, again.steps)
    for name in NAMES:
        np.testing.assert_array_equal(again.signal(name), history.signal(name)[rows])
        np.testing.assert_array_equal(again.baseline(name), history.baseline(name))
    add(again, 1, first=41)
    assert again.steps.tolist()[-2:] == [40, 41]


def test_a_thinned_past_that_lacks_the_first_reading_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(size_limits, "MOST_STORED_BYTES", 1)
    history, again = History(length=20), History(length=20)
    add(history, 30)
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert len(again) < again.length
    assert not again.has_first


@pytest.mark.parametrize("most", [8, 9, 16, 50])
@pytest.mark.parametrize("count", [1, 8, 9, 10, 17, 60, 256])
def test_rows_are_thinned_by_age(count: int, most: int) -> None:
    rows = thinned(count, most)
    assert len(rows) == min(count, most)
    assert rows[0] == 0
    assert rows[-1] == count - 1
    gaps = np.diff(rows)
    assert (gaps >= 1).all()
    assert (np.diff(gaps) <= 1).all(), "intervals do not grow towards the newest"
