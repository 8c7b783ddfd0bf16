"""Strongest finding of a rule at each head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class HeadFindings:
    """Strongest finding of each head so far; every array is ``[N]``.

    Example:
        >>> found = HeadFindings.nothing(3)
        >>> found.add(np.array([True, True, False]), 0, 40.0, "jump", ratio=5.0)
        >>> found.add(np.array([True, False, False]), 1, 80.0, "runaway")
        >>> found.rank.tolist(), found.how.tolist()
        ([1, 0, -1], ['runaway', 'jump', ''])
    """

    rank: np.ndarray
    """-1 nothing, 0 warning, 1 error."""
    level: np.ndarray
    """Score at which the head is anomalous."""
    ratio: np.ndarray
    """Score as a multiple of its own past; NaN where it is not compared."""
    kept: np.ndarray
    """Share of its past entropy that the head kept; NaN where it is not compared."""
    how: np.ndarray
    """Name of the finding, object dtype."""

    @classmethod
    def nothing(cls, heads: int) -> HeadFindings:
        """Return findings of nothing at ``heads`` heads."""
        level, ratio, kept = np.full((3, heads), np.nan)
        return cls(np.full(heads, -1), level, ratio, kept, np.full(heads, "", dtype=object))

    def add(
        self,
        where: np.ndarray,
        rank: int,
        level: object,
        how: str,
        ratio: object = np.nan,
        kept: object = np.nan,
    ) -> None:
        """Note a finding at heads without one of the same rank or a higher one.

        Args:
            where: ``[N]`` bool, the heads of the finding.
            rank: 0 warning, 1 error.
            level, ratio, kept: ``[N]`` each, or one number for all.
            how: name of the finding.
        """
        new = where & (self.rank < rank)
        self.rank[new], self.how[new] = rank, how
        for array, value in ((self.level, level), (self.ratio, ratio), (self.kept, kept)):
            array[new] = np.broadcast_to(np.asarray(value), new.shape)[new]
