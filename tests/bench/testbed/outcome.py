"""Outcome of a run beside its paired run, from losses alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from testbed.trainer import Run

MARGIN = 0.10
"""Nats above the paired run's final validation loss from which a run has failed."""
WINDOW = 15
"""Steps of the average of the gap of training losses."""


@dataclass(frozen=True)
class Outcome:
    """Failure of a run beside its paired run."""

    failed: bool
    gap: float
    """Validation loss above the paired run's, in nats; inf where it is not finite."""
    onset: int | None
    """First step of the lasting averaged gap of training losses.

    Half of the margin, or no finite loss; it stays open to the end.
    """


def outcome(run: Run, paired: Run) -> Outcome:
    """Compare a run with its paired run on the same batches."""
    gap = run.validation - paired.validation if math.isfinite(run.validation) else math.inf
    failed = gap > MARGIN
    return Outcome(failed, gap, onset(run.losses, paired.losses) if failed else None)


def onset(losses: np.ndarray, healthy: np.ndarray) -> int:
    """Return the first step of the lasting gap.

    The last step where the gap only shows on validation text. Averages are centred, so that they
    open some steps early; but never before the runs first differ.
    """
    gap = losses - healthy
    gap[~np.isfinite(gap)] = np.inf
    differs = int(np.argmax(gap != 0))
    averaged = np.lib.stride_tricks.sliding_window_view(gap, WINDOW).mean(axis=-1)
    below = np.flatnonzero(~(averaged > MARGIN / 2))
    first = int(below[-1]) + 1 + WINDOW // 2 if len(below) else 0
    bad = np.flatnonzero(~np.isfinite(losses))
    return min(max(first, differs) + 1, int(bad[0]) + 1 if len(bad) else len(losses), len(losses))
