"""Choose the optimizer steps that are sampled: often while something moves, else seldom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabmon._storage.stored_value import Stored
from stabmon._torch.host_copy import HostCopy
from stabmon._torch.process_group import rank
from stabmon.engine.sampling.movement import Movement
from stabmon.engine.sampling.overhead import OverheadBudget
from stabmon.records import Reading, StabilityIssue

logger = logging.getLogger("stabmon")

YOUNG = 4
"""Share of a run's age, as one in so many, that passes from a sample to the next at most.

Steps 1 to 8 are sampled, then 10, 12, 15, 18, 22 and so on up to ``log_every``: 4 samples each time
that the run has become 2.7 times as old.
"""
SHORTEST = 5
"""Interval, in steps, while something moves fast or an alarm is open; ``log_every`` if less."""


@dataclass(frozen=True)
class Plan:
    """Steps from a sample to the next, as one rank sees it."""

    wished: int
    """Interval that the movement of the run calls for, in steps."""
    least: int
    """Interval below which samples take more than their share of the run's time, in steps."""


class Schedule:
    """Every ``log_every``-th optimizer step; base class of the schedule that adapts.

    Args:
        log_every: interval in steps.

    Example:
        >>> [step for step in range(1, 30) if Schedule(10).wants(step)]
        [10, 20]
    """

    adapts = False
    """True if :meth:`plan` depends on readings, so that ranks must exchange it."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every

    def wants(self, step: int) -> bool:
        """Return whether a step is sampled, counted from 1; known once the step before has ended.

        Of a later step True where it, or one before it, is sampled under an adaptive schedule.
        """
        return step % self.log_every == 0

    def begin_step(self, step: int, seconds: float) -> None:
        """Prepare for a step.

        Args:
            step: the step that begins, counted from 1.
            seconds: seconds spent in stabmon so far.
        """

    def plan(self, reading: Reading) -> Plan | None:
        """Return the interval that this rank wishes for after a sampled step.

        Args:
            reading: the step's reading, or as much of it as is known.

        Returns:
            None where the schedule does not depend on readings.
        """
        return None

    def first(self, step: int) -> int:
        """Return the first step after ``step`` that is sampled, where a run starts or is resumed.

        Args:
            step: the optimizer steps made before.
        """
        return step + self.log_every - step % self.log_every

    def ahead(self, step: int, plan: Plan | None) -> tuple[int, int]:
        """Return the steps to the next sample after a sampled step, and their least number.

        Ranks take the smallest of the one and the largest of the other; the larger of these counts.

        Args:
            step: the sampled step.
            plan: the plan of this rank.
        """
        return self.log_every - step % self.log_every, 1

    def follow(self, step: int, plan: Plan | None) -> None:
        """Set the next sample after a sampled step.

        Args:
            step: the sampled step.
            plan: its plan; None where there is none.
        """

    def agree(self, step: int, following: int) -> None:
        """Set the next sample to that of all ranks.

        Args:
            step: the sampled step.
            following: the step of the next one.
        """

    def add(self, reading: Reading) -> None:
        """Keep a reading to compare later ones with."""

    def heed(self, open_issues: Sequence[StabilityIssue], *, alone: bool) -> None:
        """Look closer while an alarm is open.

        Args:
            open_issues: every issue that is open now.
            alone: no other rank must do the same, so that the next sample may come earlier at once.
        """

    def watch(self, step: int, loss: float | Tensor | None, rates: Mapping[str, float]) -> None:
        """Sample the next step where a loss or a rate has leapt; only where no rank must agree.

        Args:
            step: the step that has ended.
            loss: its loss; one on a device is looked at a step later.
            rates: rate of each parameter group.
        """

    def end_step(self, step: int, seconds: float, *, sampled: bool) -> None:
        """Note that a step has ended.

        Args:
            step: the step.
            seconds: seconds spent in stabmon so far.
            sampled: it was sampled.
        """

    def resume(
        self, readings: Sequence[Reading], losses: Sequence[tuple[int, float]], *, alone: bool
    ) -> None:
        """Go on from a stored run, after its state was restored.

        Args:
            readings: its newest readings.
            losses: step and loss of its newest steps.
            alone: no other rank must do the same; else the first step is sampled, so that ranks
                agree whatever they have restored.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as plain values."""
        return {}

    def parse_state(self, state: Any) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it.

        Raises:
            ValueError: if it is no state of a schedule.
        """
        return lambda: None


class AdaptiveSchedule(Schedule):
    """Every step at first, then more seldom up to ``log_every``, and closer where something moves.

    After a sample the interval is halved, or divided by more, where the reading moved
    (:class:`~stabmon.engine.sampling.movement.Movement`), and doubled where it did not; it is
    ``SHORTEST`` while an alarm is open. It is at most ``log_every``, a quarter of the run's age, and
    the way to the next multiple of ``log_every``. Samples are put off while they would take more
    than ``max_overhead`` of the run's time, but for the first ones
    (:class:`~stabmon.engine.sampling.overhead.OverheadBudget`).

    Args:
        log_every: interval of a quiet run, in steps.
        max_overhead: most of the run's time that samples may take, in (0, 1].

    Example:
        >>> schedule, sampled = AdaptiveSchedule(50, 0.01), []
        >>> for step in range(1, 151):
        ...     schedule.begin_step(step, 0.0)
        ...     if schedule.wants(step):
        ...         sampled.append(step)
        ...         schedule.follow(step, schedule.plan(Reading(step, None, {})))
        ...     schedule.end_step(step, 0.0, sampled=schedule.wants(step))
        >>> sampled[:12], sampled[-3:]
        ([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18], [100, 125, 150])
    """

    adapts = True

    def __init__(self, log_every: int, max_overhead: float) -> None:
        super().__init__(log_every)
        self.budget = OverheadBudget(max_overhead)
        self._movement = Movement()
        self._shortest = min(SHORTEST, log_every)
        self._first: int | None = None
        """First step of the run."""
        self._next = self._last = 0
        """Steps of the next sample and of the newest."""
        self._interval, self._least = 1, 1
        self._moved_since = 0.0
        """Movement of losses that no plan has known yet."""
        self._is_planned = self._is_alarmed = self._is_said = False
        self._loss: HostCopy | None = None

    def wants(self, step: int) -> bool:
        return step >= self._next

    def begin_step(self, step: int, seconds: float) -> None:
        if self._first is None:
            self._first = step
        if step <= self._last:  # the run has gone back, as where it is started from a checkpoint
            self._last, self._next = step - 1, step
        self.budget.begin_step(seconds)

    def plan(self, reading: Reading) -> Plan:
        limit = self._limit(reading.step)
        moved = max(self._movement.of(reading), self._moved_since)
        self._moved_since = 0.0
        if self._is_alarmed:
            self._interval = self._shortest
        elif moved >= 1:
            self._interval = int(max(self._shortest, self._interval / (2 * moved)))
        else:
            self._interval *= 2
        self._interval = min(self._interval, limit)
        self._is_planned = bool(reading.losses)
        return Plan(self._interval, self.budget.least_interval())

    def first(self, step: int) -> int:
        return step + 1

    def ahead(self, step: int, plan: Plan | None) -> tuple[int, int]:
        plan = plan or Plan(min(max(1, step // YOUNG), self.log_every), 1)
        least = plan.least
        if least >= self.log_every:
            least += -(step + least) % self.log_every
        return min(plan.wished, self.log_every - step % self.log_every), least

    def follow(self, step: int, plan: Plan | None) -> None:
        self.agree(step, step + max(self.ahead(step, plan)))
        self._least = plan.least if plan is not None else 1

    def agree(self, step: int, following: int) -> None:
        if following - step > self.log_every:
            self._report(following - step)
        self._least, self._last, self._next = 1, step, following

    def add(self, reading: Reading) -> None:
        if not self._is_planned:  # losses that the plan of this step did not know
            self._moved_since = self._movement.of_losses([loss for _, loss in reading.losses])
        self._is_planned = False
        self._movement.add(reading)

    def heed(self, open_issues: Sequence[StabilityIssue], *, alone: bool) -> None:
        self._is_alarmed = any(issue.is_alarm for issue in open_issues)
        if self._is_alarmed and alone:
            self._hasten(self._last + self._shortest)

    def watch(self, step: int, loss: float | Tensor | None, rates: Mapping[str, float]) -> None:
        if isinstance(loss, Tensor):
            last, self._loss = self._loss, HostCopy(loss)
            loss = None if last is None else float(last.read())
        if self._movement.has_leapt(loss, rates):
            self._hasten(step + 1)

    def end_step(self, step: int, seconds: float, *, sampled: bool) -> None:
        if sampled and self._next <= step:  # no reading was made
            self.follow(step, None)
        self.budget.end_step(seconds, sampled=sampled)

    def resume(
        self, readings: Sequence[Reading], losses: Sequence[tuple[int, float]], *, alone: bool
    ) -> None:
        self._movement.restore(readings, losses)
        if not alone:
            self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": self._first,
            "last": self._last,
            "next": self._next,
            "interval": self._interval,
            "budget": self.budget.state_dict(),
        }

    def parse_state(self, state: Any) -> Callable[[], None]:
        saved = Stored.of(state)
        if not saved.value:  # a run of an earlier version, or with the other schedule
            return lambda: None
        first = saved["first"].maybe(Stored.integer)
        last, coming = saved["last"].integer(), saved["next"].integer()
        interval, budget = saved["interval"].integer(), self.budget.parse_state(saved["budget"])

        def restore() -> None:
            budget()
            self._first, self._last, self._next, self._interval = first, last, coming, interval

        return restore

    def _limit(self, step: int) -> int:
        """Return the longest interval after a step."""
        age = step + 1 - (self._first or step)
        return min(max(1, age // YOUNG), self.log_every)

    def _hasten(self, step: int) -> None:
        """Let the next sample be at ``step``, or as soon after it as the budget allows."""
        self._next = min(self._next, max(step, self._last + self._least))

    def _report(self, ahead: int) -> None:
        if self._is_said or rank() != 0:
            return
        self._is_said = True
        logger.warning(
            "A sampled step takes %.2g s, so that one in %d takes more than max_overhead=%g of the "
            "run's time: the next is %d steps ahead; set a larger max_overhead or log_every, or "
            "schedule='fixed' for no limit",
            self.budget.cost,
            self.log_every,
            self.budget.share,
            ahead,
        )


def make_schedule(kind: str, log_every: int, max_overhead: float) -> Schedule:
    """Make the schedule of a configuration.

    Args:
        kind: ``adaptive`` or ``fixed``.
        log_every: interval of a quiet run, in steps.
        max_overhead: most of the run's time that samples of an adaptive schedule may take.
    """
    return Schedule(log_every) if kind == "fixed" else AdaptiveSchedule(log_every, max_overhead)
