"""How far each head has moved away from its own past, over several spans of time: the evidence of the attention rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stabmon.rules.history import History
from stabmon.rules.spread import largest, median

LAGS = (1, 2, 4, 8, 16, 32, 64)
"""Readings to look back. One and two see a jump; the longer ones see growth that no single reading shows."""
PAST_READINGS = 5
"""Readings whose largest score, and whose middle entropy, stand for the past: one wild reading neither hides nor makes a change."""
SCORE_FLOOR = 10.0
"""Scores below it count as this large: they leave a row its gradient (two keys 10 apart share their row 4.5e-5 to 1, but few
rows are that far apart), and every head of a fresh model grows manifold below it."""


@dataclass(frozen=True, eq=False)
class Change:
    """The newest reading against the readings around ``lag`` before it; every array is ``[N]``, NaN where unknown."""

    lag: int
    steps: np.ndarray
    """Optimizer steps between the past and the newest reading (at the opening, for heads with an open issue)."""
    past_logit: np.ndarray
    """Largest max_logit of the past, at least ``SCORE_FLOOR``."""
    ratio: np.ndarray
    """Newest max_logit over ``past_logit``."""
    past_entropy: np.ndarray
    """Median normalised entropy of the past."""
    kept: np.ndarray
    """Newest normalised entropy over ``past_entropy``: the share of its spread that the head kept."""
    saturated_rise: np.ndarray
    """Newest share of saturated rows minus the past's."""


def changes(history: History, issue_type: str) -> Iterator[Change]:
    """The change over every span that the history reaches back.

    The past of a head with an open issue of ``issue_type`` is frozen at the issue's opening, so that what is ill does not
    become its own measure of health; it thaws when those readings leave the history.
    """
    logit, entropy = history.signal("max_logit"), history.signal("normalized_entropy")
    saturated, steps = history.signal("saturated_fraction"), history.steps
    opened = history.opened_at(issue_type)
    ends = np.where(np.isnan(opened), len(steps) - 1, np.searchsorted(steps, np.nan_to_num(opened)))
    ends = np.where(opened < steps[0], -1, ends)
    groups = [(int(end), np.flatnonzero(ends == end)) for end in np.unique(ends)]
    for lag in LAGS:
        past = np.full((4, len(history.heads)), np.nan)
        for end, heads in groups:
            if end < lag:
                continue
            rows = slice(max(0, end - lag - PAST_READINGS + 1), end - lag + 1)
            pick = slice(None) if len(groups) == 1 else heads
            past[0, pick] = steps[end] - steps[end - lag]
            past[1, pick] = np.maximum(largest(logit[rows, pick]), SCORE_FLOOR)
            past[2, pick] = median(entropy[rows, pick])
            past[3, pick] = largest(saturated[rows, pick])
        if np.isnan(past).all():
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            yield Change(
                lag=lag,
                steps=past[0],
                past_logit=past[1],
                ratio=logit[-1] / past[1],
                past_entropy=past[2],
                kept=entropy[-1] / past[2],
                saturated_rise=saturated[-1] - past[3],
            )


def loss_fell(history: History, steps: float, *, least: int = 8, share: float = 0.03) -> bool:
    """Whether the loss of the newest ``steps`` steps is clearly below that of as many before: by ``share``, and beyond its noise.

    False where fewer than ``least`` finite losses are known on either side.
    """
    known = [(step, loss) for step, loss in history.losses if np.isfinite(loss)]
    count = max(least, sum(step > history.latest.step - steps for step, _ in known))
    newer = np.array([loss for _, loss in known[-count:]])
    older = np.array([loss for _, loss in known[-2 * count : -count]])
    if len(older) < least:
        return False
    noise = 2 * float(np.std(newer)) / len(newer) ** 0.5
    return bool(np.median(older) - np.median(newer) > max(share * abs(float(np.median(older))), noise))
