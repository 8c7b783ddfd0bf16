"""The departure of a loss is dated right where known, and absent without one."""

from __future__ import annotations

import numpy as np
import pytest
from paired_runs import WINDOW, departure, noise_of_average

STEPS = np.arange(1, 401)


def noisy(seed: int, noise: float = 0.1) -> np.ndarray:
    return 3 * np.exp(-STEPS / 200) + np.random.default_rng(seed).normal(0, noise, len(STEPS))


def by_step(values: np.ndarray) -> dict[int, float]:
    return dict(zip(STEPS.tolist(), values.tolist(), strict=True))


def test_the_noise_of_an_average_is_that_of_one_value_over_the_root_of_the_window() -> None:
    found = [noise_of_average(noisy(seed)) for seed in range(50)]
    assert np.mean(found) == pytest.approx(0.1 / np.sqrt(WINDOW), rel=0.03)


def test_a_jump_is_dated_within_half_a_window() -> None:
    healthy = noisy(0)
    gone = departure(by_step(healthy), by_step(healthy + np.where(STEPS >= 250, 0.5, 0.0)))
    assert gone.step is not None
    assert 250 - WINDOW // 2 <= gone.step <= 250
    assert gone.limit == pytest.approx(3 * 0.1 / np.sqrt(WINDOW), rel=0.25)
    assert gone.final_gap == pytest.approx(0.5)


def test_a_twin_shows_a_small_gap_that_the_curve_does_not() -> None:
    healthy = noisy(1)
    small = np.where(STEPS >= 200, 0.02 + np.random.default_rng(2).normal(0, 0.01, len(STEPS)), 0.0)
    gone = departure(by_step(healthy), by_step(healthy + small))
    assert gone.step is None
    assert gone.first_sign is not None
    assert 200 - WINDOW // 2 <= gone.first_sign <= 215


def test_a_gap_that_closes_again_is_no_departure() -> None:
    healthy = noisy(3)
    gone = departure(
        by_step(healthy), by_step(healthy + np.where((STEPS > 100) & (STEPS < 200), 1.0, 0.0))
    )
    assert gone.step is None
    assert gone.final_gap == 0


@pytest.mark.parametrize("change", [0.0, -0.5])
def test_a_twin_as_good_or_better_does_not_depart(change: float) -> None:
    healthy = noisy(4)
    gone = departure(by_step(healthy), by_step(healthy + np.where(STEPS >= 250, change, 0.0)))
    assert (gone.step, gone.first_sign) == (None, None)


def test_a_loss_that_is_no_number_is_infinitely_far_away() -> None:
    healthy = noisy(5)
    gone = departure(by_step(healthy), by_step(np.where(STEPS >= 300, np.nan, healthy)))
    assert gone.step == 300 - WINDOW // 2
    assert gone.final_gap == np.inf


def test_runs_that_are_too_short_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the runs have 41 steps in common, but a comparison takes 42"
    ):
        departure(by_step(noisy(0)), dict.fromkeys(range(1, 42), 1.0))
