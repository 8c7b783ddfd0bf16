"""Losses of a run step by step, beside the readings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stabmon.records import Reading

_RANK_LOSSES = 256
"""Steps whose largest loss of a rank is kept."""
_RECENT_LOSSES = 2000


class LossRecord:
    """Newest losses: of the whole run, and the largest of a rank.

    Args:
        most: losses of the run that are kept.

    Example:
        >>> record = LossRecord(most=2)
        >>> for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.0)):
        ...     record.add(Reading(step, loss, {}))
        >>> record.losses, record.recent.tolist()
        ([(2, nan), (3, 2.0)], [[3.0, 2.0]])
    """

    def __init__(self, most: int) -> None:
        self.losses: list[tuple[int, float]] = []
        """(step, loss) of every step whose loss is known, the newest ``most``."""
        self.rank_losses: list[tuple[int, float, int]] = []
        """(step, largest loss of a rank, that rank) of the newest steps on several ranks."""
        self._most = most
        self._recent: np.ndarray | None = None

    @property
    def recent(self) -> np.ndarray:
        """``[K, 2]`` (step, loss) of the newest 2000 losses that are finite."""
        if self._recent is None:
            newest = np.array(self.losses[-_RECENT_LOSSES:], dtype=np.float64).reshape(-1, 2)
            self._recent = newest[np.isfinite(newest[:, 1])]
        return self._recent

    def add(self, reading: Reading) -> None:
        """Add the losses of a reading: of all its steps, or of its own where it has no others."""
        own = () if reading.loss is None else ((reading.step, reading.loss),)
        self.losses += reading.losses or own
        del self.losses[: -self._most]
        known_until = self.rank_losses[-1][0] if self.rank_losses else 0
        self.rank_losses += [each for each in reading.rank_losses if each[0] > known_until]
        del self.rank_losses[:-_RANK_LOSSES]
        self._recent = None

    def rolled_back(self, step: int) -> None:
        """Drop the losses after ``step``, whose state the run is in again."""
        self.losses = [(at, loss) for at, loss in self.losses if at <= step]
        self.rank_losses = [each for each in self.rank_losses if each[0] <= step]
        self._recent = None

    def resumed(self, losses: Sequence[tuple[int, float]]) -> LossRecord:
        """Return a record of the same length with stored losses of the run."""
        record = LossRecord(self._most)
        record.losses = list(losses)[-self._most :]
        return record
