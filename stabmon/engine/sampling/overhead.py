"""Measure what sampled steps cost, and keep it below a share of the run's time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from stabmon._storage.stored_value import Stored

FREE_SAMPLES = 128
"""First samples of a run, which are not counted against the share.

They see a run through its start, and a run of a few hundred steps as a whole, whose steps may take
no longer than the sample itself.
"""
_NEWEST = 9
"""Steps from whose costs a median is taken."""


class OverheadBudget:
    """Seconds spent on sampled steps, against a share of all the seconds of the run.

    The cost of a sample is what a sampled step spends in stabmon beyond a step that is not sampled.
    What runs at every step, and what interventions take, is not counted: to sample less would not
    make it less.

    Args:
        share: the most of the run's time that samples may take, in (0, 1]; 1 for no limit.
        clock: returns seconds.

    Example:
        >>> now = iter(range(0, 1000, 10))
        >>> budget = OverheadBudget(0.1, clock=lambda: float(next(now)))
        >>> for _ in range(3):
        ...     budget.begin_step(0.0)
        ...     budget.end_step(0.5, sampled=True)
        >>> budget.least_interval()
        1
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self.samples = 0
        """Samples taken so far."""
        self.spent = 0.0
        """Seconds of the samples after the first ones, which are free."""
        self._clock, self._began = clock, math.nan
        self._elapsed, self._steps = 0.0, 0
        self._before = 0.0
        self._sampled: deque[float] = deque(maxlen=_NEWEST)
        self._others: deque[float] = deque(maxlen=_NEWEST)

    def begin_step(self, seconds: float) -> None:
        """Note that a step begins.

        Args:
            seconds: seconds spent in stabmon so far.
        """
        if math.isnan(self._began):
            self._began = self._clock()
        self._before = seconds

    def end_step(self, seconds: float, *, sampled: bool) -> None:
        """Note that a step has ended.

        Args:
            seconds: seconds spent in stabmon so far.
            sampled: the step was sampled.
        """
        now = self._clock()
        if not math.isnan(self._began):
            self._elapsed, self._began = self._elapsed + now - self._began, now
        self._steps += 1
        took = seconds - self._before
        if not sampled:
            self._others.append(took)
            return
        self.samples += 1
        cost = max(0.0, took - median(self._others or [0.0]))
        self._sampled.append(cost)
        if self.samples > FREE_SAMPLES:
            self.spent += cost

    @property
    def cost(self) -> float:
        """Seconds of a sample, the median of the newest."""
        return median(self._sampled or [0.0])

    def least_interval(self) -> int:
        """Return the least number of steps to the next sample, so that the share is kept to.

        For the step in progress, which is sampled and whose own cost is not known yet.
        """
        if self.samples < FREE_SAMPLES or self.share >= 1 or not self._steps:
            return 1
        missing = self.spent + 2 * self.cost - self.share * self._elapsed
        a_step = self.share * self._elapsed / self._steps
        return max(1, math.ceil(missing / a_step)) if a_step > 0 else 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as plain values."""
        return {
            "samples": self.samples,
            "spent": self.spent,
            "elapsed": self._elapsed,
            "steps": self._steps,
        }

    def parse_state(self, state: Mapping[str, Any] | Stored) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it.

        Raises:
            ValueError: if it is no state of a budget.
        """
        saved = Stored.of(state)
        samples, steps = saved["samples"].integer(), saved["steps"].integer()
        spent, elapsed = saved["spent"].number(), saved["elapsed"].number()

        def restore() -> None:
            self.samples, self.spent = samples, spent
            self._elapsed, self._steps = elapsed, steps

        return restore
