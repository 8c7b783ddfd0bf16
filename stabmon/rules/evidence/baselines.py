"""Change of each head against its own past, over several spans of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stabmon.rules.evidence.robust_stats import largest, median
from stabmon.rules.tracking.history import History

JUMP_READINGS, JUMP_STEPS = 2, 10
"""Readings, or optimizer steps if these are more, over which a change is a jump.

Readings may be a step apart, and growth over ten steps is then as sudden as over two readings.
"""
PAST_READINGS = 5
"""Number of readings in the past.

Of their scores the largest counts, of their entropies the median: one wild reading neither hides
nor makes a change.
"""
SCORE_FLOOR = 10.0
"""Score that all smaller ones count as.

They leave a row its gradient (two keys 10 apart share their row 4.5e-5 to 1, but few rows are that
far apart), and every head of a fresh model grows manifold below it.
"""


@dataclass(frozen=True, eq=False)
class Change:
    """Newest reading against the readings up to ``lag`` before it.

    Every array is ``[N]``, NaN where unknown.
    """

    lag: int
    """Readings between the past and the newest reading."""
    is_jump: bool
    """True over the shortest spans, which show a jump; longer ones show growth."""
    steps: int
    """Optimizer steps between the past and the newest reading."""
    past_logit: np.ndarray
    """Largest max_logit of the past, at least ``SCORE_FLOOR``."""
    ratio: np.ndarray
    """Newest max_logit over ``past_logit``."""
    past_entropy: np.ndarray
    """Median normalised entropy of the past."""
    kept: np.ndarray
    """Newest normalised entropy over ``past_entropy``: the share that the head kept."""
    saturated_rise: np.ndarray
    """Newest share of saturated rows minus the past's largest."""


def changes(
    history: History, *, jumps_only: bool = False, least_ratio: float = 0.0
) -> Iterator[Change]:
    """Yield the change over every span that the history reaches back, the shortest first.

    Spans end at every reading near the newest, and farther back each is an eighth longer than the
    one before: readings may be unevenly spaced, and no growth falls between two spans.

    Args:
        history: the readings so far.
        jumps_only: only spans of at most ``JUMP_READINGS`` readings or ``JUMP_STEPS`` steps.
        least_ratio: growth of some head's score without which a span is left out.
    """
    names = ("max_logit", "normalized_entropy", "saturated_fraction")
    logit, entropy, saturated = (history.now(name) for name in names)
    steps = history.steps
    newest = len(steps) - 1
    large = np.flatnonzero(logit >= least_ratio * SCORE_FLOOR)  # others did not grow so much
    if newest < 1 or (least_ratio > 0 and not len(large)):
        return
    for lag in _lags(newest):
        passed = int(steps[newest] - steps[newest - lag])
        is_jump = lag <= JUMP_READINGS or passed <= JUMP_STEPS
        if jumps_only and not is_jump:
            return
        rows = slice(max(0, newest - lag - PAST_READINGS + 1), newest - lag + 1)
        if least_ratio > 0:
            past = np.maximum(largest(history.rows("max_logit", rows, large)), SCORE_FLOOR)
            if not (logit[large] >= least_ratio * past).any():
                continue
        past_logit = np.maximum(largest(history.rows("max_logit", rows)), SCORE_FLOOR)
        past_entropy = median(history.rows("normalized_entropy", rows))
        with np.errstate(divide="ignore", invalid="ignore"):
            yield Change(
                lag=lag,
                is_jump=is_jump,
                steps=passed,
                past_logit=past_logit,
                ratio=logit / past_logit,
                past_entropy=past_entropy,
                kept=entropy / past_entropy,
                saturated_rise=saturated - largest(history.rows("saturated_fraction", rows)),
            )


def _lags(most: int) -> Iterator[int]:
    """Yield readings to look back: all up to 16, then each an eighth more than the last."""
    lag = 1
    while lag <= most:
        yield lag
        lag += max(1, lag // 8)


def jump_needed(history: History, steps: int, jump: float) -> float:
    """Return the growth of a score, as a multiple of its own past, that is a jump.

    ``jump``, and again for each 100 steps, thrice at most. A quarter more where the loss clearly
    fell over the same span, which is evidence of learning.

    Args:
        history: the readings so far.
        steps: optimizer steps over which the score grew.
        jump: growth within one step.
    """
    return (1.25 if loss_fell(history, steps) else 1.0) * jump * min(1 + steps / 100, 3.0)


def loss_fell(history: History, steps: float, *, least: int = 8, share: float = 0.03) -> bool:
    """Return True if the newest losses are clearly below as many before them.

    Args:
        history: the readings so far.
        steps: optimizer steps whose losses are compared with those of as many before.
        least: finite losses needed on either side, else False.
        share: share of the older median by which it must have fallen; and beyond its noise.
    """
    known = history.recent_losses
    count = max(least, int((known[:, 0] > history.latest.step - steps).sum()))
    newer, older = known[-count:, 1], known[-2 * count : -count, 1]
    if len(older) < least:
        return False
    noise = 2 * float(np.std(newer)) / len(newer) ** 0.5
    return bool(
        np.median(older) - np.median(newer) > max(share * abs(float(np.median(older))), noise)
    )


def loss_rose(history: History, readings: int, *, past: int = 50) -> bool:
    """Return True if the newest losses lie above their usual range.

    Args:
        history: the readings so far.
        readings: number of newest readings whose losses are judged, and of at least 8 steps.
        past: number of losses before them that make up the usual range.
    """
    since = history.readings[-readings - 1].step if len(history) > readings else 0
    since = min(since, history.latest.step - 8)
    known = history.recent_losses
    newer, older = known[known[:, 0] > since, 1], known[known[:, 0] <= since, 1][-past:]
    if not len(newer) or len(older) < 8:
        return False
    return bool(np.median(newer) > np.quantile(older, 0.9))
