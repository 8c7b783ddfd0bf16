"""The robust line: against scipy, against outliers and NaN, and its forecast."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stabmon.rules import History
from stabmon.rules.evidence.forecast import forecast_score, steps_until, theil_sen
from stabmon.rules.evidence.robust_stats import largest, median, robust_spread
from tests.support.trajectories import readings, shape


@given(st.integers(8, 25), st.integers(0, 100), st.floats(0.01, 5))
@settings(max_examples=40, deadline=None)
def test_slope_and_interval_are_scipys(count, seed, noise):
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.integers(1, 20, count)).astype(float)
    y = 0.3 * x[:, None] + noise * rng.standard_normal((count, 3))
    line = theil_sen(x, y)
    for n in range(3):
        expected = stats.theilslopes(y[:, n], x, alpha=0.95)
        assert line.slope[n] == pytest.approx(expected.slope)
        assert (line.low[n], line.high[n]) == pytest.approx(
            (expected.low_slope, expected.high_slope)
        )


def test_a_quarter_of_wild_samples_moves_it_little():
    x = np.arange(20.0)
    y = 2 * x[:, None] + 0.01 * np.random.default_rng(0).standard_normal((20, 1))
    y[::4] += 1000
    assert theil_sen(x, y).slope[0] == pytest.approx(2.0, rel=0.05)


def test_nan_and_inf_are_samples_that_are_not_there():
    x = np.arange(12.0)
    y = np.stack([3 * x, 3 * x, np.full(12, np.nan)], axis=1)
    y[[1, 4], 1] = np.nan, np.inf
    line = theil_sen(x, y)
    np.testing.assert_allclose(line.slope, [3, 3, np.nan])
    assert line.samples.tolist() == [12, 10, 0]


def test_seven_samples_are_too_few_and_eight_are_enough():
    x = np.arange(8.0)
    assert np.isnan(theil_sen(x[:7], x[:7, None]).slope).all()
    assert theil_sen(x, x[:, None]).slope[0] == 1.0


def test_the_interval_holds_the_true_slope_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(3)
    x = np.arange(20.0)
    line = theil_sen(x, 0.5 * x[:, None] + rng.standard_normal((20, 2000)))
    covered = ((line.low <= 0.5) & (line.high >= 0.5)).mean()
    assert 0.93 <= covered <= 0.98


def test_steps_until_is_zero_there_inf_when_falling_and_nan_when_unknown():
    np.testing.assert_array_equal(
        steps_until(np.array([9.0, 1, 1, np.nan]), np.array([1.0, 0, -1, 1]), 5.0),
        [0, np.inf, np.inf, np.nan],
    )


def forecast(curve, every=10):
    history = History()
    for r in readings({"max_logit": shape(curve)}, every=every):
        history.add(r)
    return forecast_score(history, 1000.0, least=20.0)


def test_exponential_growth_is_forecast_exactly_and_its_onset_within_eight_readings():
    steps = np.arange(10, 310, 10)
    assert forecast(10 * np.exp(0.01 * steps)).eta[0] == pytest.approx((np.log(100) - 3.0) / 0.01)
    late = 30 * np.exp(0.02 * np.maximum(0, steps - 220))
    assert forecast(late).eta[0] == pytest.approx(np.log(1000 / late[-1]) / 0.02)


def test_flat_scores_have_no_meeting_and_small_or_short_ones_no_forecast():
    assert forecast(np.full(20, 50.0)).eta[0] == np.inf
    assert np.isnan(forecast(np.geomspace(0.1, 10, 20)).eta).all()
    assert np.isnan(forecast(np.geomspace(10, 100, 5)).eta).all()


def test_medians_skip_nan_and_tell_nothing_from_nothing():
    values = np.array([[1.0, np.nan, np.nan], [9, np.inf, np.nan], [2, 5, np.nan]])
    np.testing.assert_array_equal(median(values), [2, 5, np.nan])
    np.testing.assert_array_equal(largest(values), [9, 5, np.nan])
    np.testing.assert_allclose(robust_spread(values), [1.4826, 0, np.nan])
