"""Decide whether a parameter group's rate has jumped above all of its own past."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping

from stabmon.engine.step_length.past_settings import PastSettings

RISE = 4.0
"""Times a group's own highest rate so far at which its rate has jumped.

Warm-ups rise by 2 at most in a step, restarts come back to a rate of their past, and a group that
is unfrozen has none. Schedules that change by the epoch may rise further: their steps stay short.
"""
TRAINED = 8
"""Steps with a rate above 0 after which a group has a past."""
FAR = 0.05
"""Relative update of a step from which a jump does damage.

Steps of healthy groups, once warm, stay below 0.04; 0.05 turns a group over in 20 steps.
"""
AHEAD = 3.0
"""Times the other groups' median relative update from which a group that jumps alone moves far.

A trained model's groups move by far less than ``FAR`` in fine-tuning.
"""
ALIKE = 2.0
"""Factor within which groups have jumped alike, so that their median update counts.

A part that began at zero moves far in any step; the rest of the model shows the size of the jump.
"""


class RateJumps(PastSettings):
    """Highest rate of each parameter group so far, and the groups that are far above it.

    A rate that has jumped is on trial until its step is known. It is accepted where the step is
    short, and else open until the rate comes down.

    Example:
        >>> jumps = RateJumps()
        >>> for _ in range(8):
        ...     _ = jumps.add({"0.0": 0.1, "0.1": 0.1}, {})
        >>> jumps.find({"0.0": 0.1, "0.1": 3.0})
        {'0.1': 0.1}
        >>> jumps.add({"0.0": 0.1, "0.1": 3.0}, {"0.1": 0.3})
        {'0.1': 0.1}
    """

    def find(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Return the highest rate before, of each group that jumps with these rates.

        Args:
            rates: rate of each group in the step that is about to be made.
        """
        return {key: self._highest[key] for key in self._above(rates) if key not in self._open}

    def multiple(self, key: str, others: Collection[str]) -> float:
        """Return the rate of a group over the median of others, when it had last not jumped.

        Args:
            key: the group.
            others: the other groups.

        Returns:
            Infinity where that is not known.
        """
        known = [rate for each in others if (rate := self._newest.get(each, 0.0)) > 0]
        rate = self._newest.get(key, 0.0)
        return rate / statistics.median(known) if known and rate > 0 else math.inf

    def add(
        self,
        rates: Mapping[str, float],
        updates: Mapping[str, float],
        others: float = math.inf,
    ) -> dict[str, float]:
        """Add a step that was made.

        Args:
            rates: rate of each group.
            updates: relative update that these rates make, of groups that :meth:`find` returned; 0
                where no step was made, which is no answer yet, and NaN where it cannot be known.
            others: median relative update of groups that did not jump.

        Returns:
            The highest rate before, of each group that has jumped and moves too far by it.
        """
        above = self._above(rates)
        self._open -= rates.keys() - above.keys()
        far = {
            key
            for key in above
            if key not in self._open and _moves_far(key, above, updates, min(FAR, AHEAD * others))
        }
        waiting = {key for key in above if updates.get(key, 0.0) == 0}
        found = {key: self._highest[key] for key in above if key in far}
        self._open |= far
        for key, rate in rates.items():
            if rate > 0 and key not in self._open and key not in waiting:
                self._newest[key] = rate
                self._highest[key] = max(rate, self._highest.get(key, 0.0))
                self._steps[key] = self._steps.get(key, 0) + 1
        return found

    def _above(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Return how many times its own highest rate each group that has jumped is at."""
        return {
            key: rate / self._highest[key]
            for key, rate in rates.items()
            if self._steps.get(key, 0) >= TRAINED and rate >= RISE * self._highest[key]
        }


def _moves_far(
    key: str, above: Mapping[str, float], updates: Mapping[str, float], level: float
) -> bool:
    """Return whether groups that jumped like this one move far, by their lower median."""
    alike = sorted(
        updates[each]
        for each, times in above.items()
        if 1 / ALIKE <= times / above[key] <= ALIKE and not math.isnan(updates.get(each, math.nan))
    )
    return bool(alike) and key in updates and alike[(len(alike) - 1) // 2] >= level
