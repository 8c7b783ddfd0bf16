"""Compare a provoked run's loss with that of its healthy paired run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

WINDOW = 21
"""Steps of an average, centred on the step in question.

Looking ahead dates a departure early rather than late.
"""
NOISES = 3.0


@dataclass(frozen=True)
class Departure:
    """Departure of a provoked run's loss from its paired run's.

    Steps are None where there was no departure.
    """

    step: int | None
    """First step of a lasting averaged gap above ``limit``.

    It stays above to the end: as seen from the loss alone.
    """
    limit: float
    """``NOISES`` times the noise of an averaged healthy loss, in nats."""
    first_sign: int | None
    """The same for ``first_sign_limit``.

    Only a healthy paired run on the same batches can show it.
    """
    first_sign_limit: float
    """``NOISES`` times the noise of an averaged gap, in nats.

    The batches' own scatter is gone from it.
    """
    final_gap: float
    """Gap over the last ``WINDOW`` steps, in nats.

    Positive where the provoked run is worse.
    """


def departure(healthy: Mapping[int, float], provoked: Mapping[int, float]) -> Departure:
    """Compare two runs of the same seed and data, each step -> loss.

    The gap is provoked minus healthy, averaged over ``WINDOW`` steps; a loss that is not finite is
    infinitely far away.

    Raises:
        ValueError: if fewer than ``2 * WINDOW`` steps are common to both.
    """
    steps = np.array(sorted(healthy.keys() & provoked.keys()))
    if len(steps) < 2 * WINDOW:
        raise ValueError(
            f"the runs have {len(steps)} steps in common, but a comparison takes {2 * WINDOW}: "
            "train longer"
        )
    base = np.array([healthy[step] for step in steps])
    gap = np.array([provoked[step] for step in steps]) - base
    gap[~np.isfinite(gap)] = np.inf
    differs = gap[np.argmax(gap != 0) :]
    limit = NOISES * noise_of_average(base)
    first_sign_limit = NOISES * noise_of_average(differs[np.isfinite(differs)])
    centres, averages = steps[WINDOW // 2 : -(WINDOW // 2)], _averages(gap)
    return Departure(
        step=_stays_above(centres, averages, limit),
        limit=limit,
        first_sign=_stays_above(centres, averages, first_sign_limit),
        first_sign_limit=first_sign_limit,
        final_gap=float(gap[-WINDOW:].mean()),
    )


def noise_of_average(values: np.ndarray) -> float:
    """Return the standard deviation of averages of ``WINDOW`` values by chance.

    From the values' spread (1.4826 times the median absolute deviation) around their own moving
    average, so that a trend does not count; NaN for fewer than ``WINDOW`` values.
    """
    if len(values) < WINDOW:
        return float("nan")
    around = values[WINDOW // 2 : -(WINDOW // 2)] - _averages(values)
    spread = (
        1.4826 * float(np.median(np.abs(around))) / np.sqrt(1 - 1 / WINDOW)
    )  # an average holds a part of its own centre
    return float(spread / np.sqrt(WINDOW))


def _averages(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average, infinite where a value is.

    Shorter than ``values`` by ``WINDOW - 1``.
    """
    return np.asarray(np.lib.stride_tricks.sliding_window_view(values, WINDOW).mean(axis=-1))


def _stays_above(steps: np.ndarray, values: np.ndarray, limit: float) -> int | None:
    """Return the first step with all values above ``limit`` to the end."""
    below = np.flatnonzero(~(values > limit))
    first = 0 if len(below) == 0 else int(below[-1]) + 1
    return int(steps[first]) if first < len(steps) else None
