"""Issues of the shipped rules and risk, raised again from kept readings of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stabmon.config import StabilityConfig, load_config
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.monitor_parts import make_tracker
from stabmon.engine.sampling.overhead import OverheadBudget
from stabmon.engine.sampling.schedule import AdaptiveSchedule, make_schedule
from stabmon.records import Reading, StabilityIssue
from stabmon.risk import RiskJudge, RiskModel
from stabmon.rules.tracking.issue_tracker import IssueTracker

SAMPLE_STEPS = 1.0
"""Cost of a sample in steps, for the share of a run's time that samples may take."""


@dataclass(frozen=True)
class Sampling:
    """Interval and schedule of a monitor."""

    log_every: int
    schedule: str = "fixed"

    def __str__(self) -> str:
        return f"{self.schedule}, every {self.log_every}"


def replay(
    readings: Sequence[Reading], sampling: Sampling, model: RiskModel | None = None
) -> Iterator[tuple[Reading, list[StabilityIssue]]]:
    """Yield each reading that a monitor would have made, with the issues that it would emit.

    Args:
        readings: a reading of each step. Of steps that are not sampled only what is found at every
            step is used: episodes that are not finite, and steps that are too long.
        sampling: the monitor's schedule; an adaptive one is fed the same readings.
        model: the risk; None for the shipped one.
    """
    config = load_config("observe", log_every=sampling.log_every, schedule=sampling.schedule)
    tracker, clock = _tracker(config, model), _Clock()
    schedule = make_schedule(config.schedule, config.log_every, config.max_overhead)
    if isinstance(schedule, AdaptiveSchedule):
        schedule.budget = OverheadBudget(config.max_overhead, clock=lambda: clock.now)
    losses: list[tuple[int, float]] = []
    norms: dict[str, float] = {}
    """Of each part's weights after the newest sample."""
    after_sample = False
    for reading in readings:
        if after_sample:
            norms = {part: moved.before for part, moved in reading.parts.items()}
        schedule.begin_step(reading.step, clock.spent)
        sampled = schedule.wants(reading.step)
        clock.add(sampled)
        losses += reading.losses
        seen = _seen(reading, tuple(losses), norms, sampled)
        after_sample = sampled
        if seen is not None:
            losses = []
            if sampled:
                schedule.follow(seen.step, schedule.plan(seen))
            schedule.add(seen)
            yield seen, tracker.update(seen)
            schedule.heed(tracker.open_issues, alone=True)
        schedule.end_step(reading.step, clock.spent, sampled=sampled)
        schedule.watch(reading.step, reading.loss, reading.learning_rates)


def alarms(
    readings: Sequence[Reading], sampling: Sampling, model: RiskModel | None = None
) -> Iterator[list[StabilityIssue]]:
    """Yield the alarms of each reading that has some, the first cause first."""
    for _, issues in replay(readings, sampling, model):
        if found := [each for each in issues if each.is_alarm and each.state != "closed"]:
            yield found


class _Clock:
    """Time of a run in which each step takes a second."""

    def __init__(self) -> None:
        self.now = self.spent = 0.0

    def add(self, sampled: bool) -> None:
        cost = SAMPLE_STEPS if sampled else 0.0
        self.now, self.spent = self.now + 1 + cost, self.spent + cost


def _tracker(config: StabilityConfig, model: RiskModel | None) -> IssueTracker:
    made = make_tracker(config, ErrorBoundary())
    if model is None:
        return made
    return IssueTracker(
        made.rules,
        history=made.history,
        clear_after=made.clear_after,
        cooldown_steps=made.cooldown_steps,
        judge=RiskJudge(config.false_alarm_rate, model),
    )


def _seen(
    reading: Reading,
    losses: tuple[tuple[int, float], ...],
    norms: Mapping[str, float],
    sampled: bool,
) -> Reading | None:
    """Return what a monitor knows of a step; None where it makes no reading.

    Args:
        reading: what is known where every step is sampled.
        losses: of the steps since the reading before.
        norms: of each part's weights after the sample before.
        sampled: whether the step is.
    """
    if sampled:
        parts = {
            part: replace(moved, before=norms.get(part, math.nan))
            for part, moved in reading.parts.items()
        }
        return replace(reading, losses=losses, parts=parts)
    if reading.non_finite is None and reading.overshoot is None:
        return None
    return replace(
        reading,
        layers={},
        info={},
        gradients={},
        query_key={},
        updates={},
        parts={},
        losses=losses,
        sampled=False,
    )
