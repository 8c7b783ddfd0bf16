"""Whether and when a run failed, from its losses and its twin's alone; and whether attention was
the cause, from two more runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from testbed.trainer import Run

MARGIN = 0.10
"""Nats above the healthy twin's final validation loss from which a run has failed."""
WINDOW = 15
"""Steps that the gap of training losses is averaged over."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended beside its twin."""

    failed: bool
    gap: float
    """Validation loss above the twin's, in nats; inf where it is not finite."""
    onset: int | None
    """The step from which on, to the end, the averaged gap of training losses stays open (half of
    the margin, or no finite loss).
    """


def outcome(run: Run, twin: Run) -> Outcome:
    """Compare a run with its twin on the same batches."""
    gap = run.validation - twin.validation if math.isfinite(run.validation) else math.inf
    failed = gap > MARGIN
    return Outcome(failed, gap, onset(run.losses, twin.losses) if failed else None)


def onset(losses: np.ndarray, healthy: np.ndarray) -> int:
    """The first step from which on the gap stays open; the last step where it only shows on
    validation text.

    Averages are centred, so that they open some steps early; but never before the runs first
    differ.
    """
    gap = losses - healthy
    gap[~np.isfinite(gap)] = np.inf
    differs = int(np.argmax(gap != 0))
    averaged = np.lib.stride_tricks.sliding_window_view(gap, WINDOW).mean(axis=-1)
    below = np.flatnonzero(~(averaged > MARGIN / 2))
    first = int(below[-1]) + 1 + WINDOW // 2 if len(below) else 0
    bad = np.flatnonzero(~np.isfinite(losses))
    return min(max(first, differs) + 1, int(bad[0]) + 1 if len(bad) else len(losses), len(losses))
