"""How far each head has moved away from its own past, over several spans of time: the evidence of
the attention rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from stabmon.rules.evidence.robust_stats import largest, median
from stabmon.rules.tracking.history import History

LAGS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Readings to look back. One and two see a jump; the longer ones see growth that no single reading
shows.
"""
PAST_READINGS = 5
"""Readings whose largest score, and whose middle entropy, stand for the past: one wild reading
neither hides nor makes a change.
"""
SCORE_FLOOR = 10.0
"""Scores below it count as this large: they leave a row its gradient (two keys 10 apart share their
row 4.5e-5 to 1, but few rows are that far apart), and every head of a fresh model grows manifold
below it."""


@dataclass(frozen=True, eq=False)
class Change:
    """The newest reading against the readings up to ``lag`` before it; every array is ``[N]``, NaN
    where unknown.
    """

    lag: int
    steps: int
    """Optimizer steps between the past and the newest reading."""
    past_logit: np.ndarray
    """Largest max_logit of the past, at least ``SCORE_FLOOR``."""
    ratio: np.ndarray
    """Newest max_logit over ``past_logit``."""
    past_entropy: np.ndarray
    """Median normalised entropy of the past."""
    kept: np.ndarray
    """Newest normalised entropy over ``past_entropy``: the share of its spread that the head
    kept.
    """
    saturated_rise: np.ndarray
    """Newest share of saturated rows minus the past's largest."""


def changes(
    history: History, lags: Iterable[int] = LAGS, *, least_ratio: float = 0.0
) -> Iterator[Change]:
    """The change over every span that the history reaches back and over which some head's score
    grew ``least_ratio`` times.
    """
    logit, entropy = history.signal("max_logit"), history.signal("normalized_entropy")
    saturated, steps = history.signal("saturated_fraction"), history.steps
    newest = len(steps) - 1
    for lag in lags:
        if lag > newest:
            return
        rows = slice(max(0, newest - lag - PAST_READINGS + 1), newest - lag + 1)
        past_logit = np.maximum(largest(logit[rows]), SCORE_FLOOR)
        if least_ratio > 0 and not (logit[newest] >= least_ratio * past_logit).any():
            continue
        past_entropy = median(entropy[rows])
        with np.errstate(divide="ignore", invalid="ignore"):
            yield Change(
                lag=lag,
                steps=int(steps[newest] - steps[newest - lag]),
                past_logit=past_logit,
                ratio=logit[newest] / past_logit,
                past_entropy=past_entropy,
                kept=entropy[newest] / past_entropy,
                saturated_rise=saturated[newest] - largest(saturated[rows]),
            )


def jump_needed(history: History, steps: int, jump: float) -> float:
    """Times its own past that a score must grow within ``steps`` steps to be a jump: ``jump``, and
    again for each 100, thrice at most.

    A quarter more where the loss clearly fell over the same span, which speaks for learning.
    """
    return (1.25 if loss_fell(history, steps) else 1.0) * jump * min(1 + steps / 100, 3.0)


def loss_fell(history: History, steps: float, *, least: int = 8, share: float = 0.03) -> bool:
    """Whether the loss of the newest ``steps`` steps is clearly below that of as many before: by
    ``share``, and beyond its noise.

    False where fewer than ``least`` finite losses are known on either side.
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
    """Whether the losses since the last ``readings`` readings lie above the usual range of the
    ``past`` before them.
    """
    since = history.readings[-readings - 1].step if len(history) > readings else 0
    known = history.recent_losses
    newer, older = known[known[:, 0] > since, 1], known[known[:, 0] <= since, 1][-past:]
    if not len(newer) or len(older) < 8:
        return False
    return bool(np.median(newer) > np.quantile(older, 0.9))
