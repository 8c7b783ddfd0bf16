"""Outcome of a run from losses alone, beside its paired run and its counterfactual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tests.bench.byte_gpt.recipe import Recipe

Label = Literal["attention", "other", "healthy", "unclear"]
FAILED = 0.15
"""Nats above the paired run over the last steps, from which a run has failed."""
HEALTHY = 0.10
"""Nats above the paired run below which a run is healthy."""
RISE = 0.25
"""Nats above its own lowest loss from which a run has failed."""
WINDOW, LAST = 25, 50
"""Steps of the trailing averages, and at the end."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    label: Label
    """``attention`` where it failed and the run without attention's growth did not."""
    onset: int | None = None
    """First step of the failure, counted from 1; None where there is none.

    The first loss that is not finite, or the first of 25 steps with a gap above 0.15 nats.
    """
    gap: float | None = None
    """Mean of the last 50 losses above the paired run's, in nats; None without a paired run."""
    gap_without_growth: float | None = None
    """The same above the counterfactual."""


@dataclass(frozen=True)
class _Judged:
    """A run beside one other run."""

    failed: bool
    onset: int | None
    gap: float | None
    is_finite: bool


def outcomes(recipes: Mapping[str, Recipe], losses: Mapping[str, np.ndarray]) -> dict[str, Outcome]:
    """Return the outcome of each run, by name.

    Args:
        recipes: the recipes by name, those of paired runs and counterfactuals included.
        losses: losses of each run by name, the same.
    """
    return {name: outcome(recipe, losses) for name, recipe in recipes.items()}


def outcome(recipe: Recipe, losses: Mapping[str, np.ndarray]) -> Outcome:
    """Return the outcome of one run; ``losses`` has those of the runs that it is held against."""
    pair = None if recipe.paired == recipe.name else losses[recipe.paired]
    own = _judged(losses[recipe.name], pair)
    if not own.failed:
        return Outcome(
            "healthy" if own.gap is None or own.gap < HEALTHY else "unclear", gap=own.gap
        )
    if not recipe.without_growth:
        return Outcome("other", own.onset, own.gap)
    other = losses[recipe.without_growth]
    gap = _judged(losses[recipe.name], other).gap
    others_finite = bool(np.isfinite(other).all())
    by_attention = gap is not None and gap > FAILED if own.is_finite else others_finite
    return Outcome("attention" if by_attention else "other", own.onset, own.gap, gap)


def _judged(losses: np.ndarray, other: np.ndarray | None) -> _Judged:
    bad = np.flatnonzero(~np.isfinite(losses))
    finite = losses[: bad[0]] if len(bad) else losses
    smooth = _trailing(finite)
    starts = [int(bad[0])] if len(bad) else []
    rises = len(smooth) > WINDOW and finite[-LAST:].mean() - smooth[WINDOW - 1 :].min() > RISE
    if rises:
        starts.append(_start_of_rise(smooth))
    gap = None
    if other is not None:
        length = min(len(finite), len(other))
        difference = finite[:length] - other[:length]
        gap = float(difference[-LAST:].mean()) if length else float("nan")
        if gap > FAILED and (start := _start_of_gap(_trailing(difference))) is not None:
            starts.append(start)
    failed = bool(len(bad) or rises or (gap is not None and gap > FAILED))
    onset = min(starts, default=len(losses)) + 1 if failed else None
    return _Judged(failed, onset, gap, not len(bad))


def _trailing(values: np.ndarray) -> np.ndarray:
    """Return means over the last 25 values, fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - WINDOW)
    means: np.ndarray = (total[last] - total[first]) / (last - first)
    return means


def _start_of_gap(gap: np.ndarray) -> int | None:
    over = gap > FAILED
    for at in range(10, len(gap) - WINDOW):
        if over[at : at + WINDOW].all():
            return at
    return None


def _start_of_rise(smooth: np.ndarray) -> int:
    lowest = np.minimum.accumulate(np.where(np.arange(len(smooth)) < WINDOW - 1, np.inf, smooth))
    above = smooth > lowest + RISE
    at = len(smooth) - 1
    while at > 0 and above[at]:
        at -= 1
    return at + 1
