"""Make the parts of a monitor and connect them to one clock."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import or_
from pathlib import Path
from typing import Any

from torch import nn

from stabmon._torch.callbacks.weak_method import weakly
from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon._torch.process_group import world_size
from stabmon._torch.ranks.exchange import RankExchange
from stabmon.config import StabilityConfig, proposed_interventions
from stabmon.engine.clock import StepClock
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.rank_reducer import RankReducer
from stabmon.engine.recording.issue_function import IssueFunction, OnIssue
from stabmon.engine.recording.reading_builder import ReadingBuilder
from stabmon.engine.recording.recorder import Recorder
from stabmon.engine.sampling.schedule import SHORTEST, Schedule, make_schedule
from stabmon.engine.step_contexts import StepContexts
from stabmon.engine.step_length.setting_watch import SettingWatch
from stabmon.engine.step_length.watch import StepLength
from stabmon.engine.step_observer import StepObserver
from stabmon.engine.updates.part_changes import PartChanges
from stabmon.engine.updates.weight_updates import WeightUpdates
from stabmon.engine.usage import Usage
from stabmon.guard import Guard
from stabmon.interventions import TrainingRun
from stabmon.listeners import StepListener
from stabmon.nonfinite.detector import NonFiniteDetector
from stabmon.risk import RiskJudge
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.rules.tracking.reading_arrays import EVERY_READING, LooksBack


@dataclass(frozen=True)
class MonitorParts:
    """The parts of one monitor, connected to each other."""

    optimizers: OptimizerAdapter
    recorder: Recorder
    guard: Guard
    clock: StepClock
    observer: StepObserver
    detector: NonFiniteDetector
    step_length: StepLength
    settings: SettingWatch
    updates: WeightUpdates
    usage: Usage
    readings: ReadingBuilder
    contexts: StepContexts
    schedule: Schedule
    exchange: RankExchange | None
    """With the other ranks; None on one process, and where it reports alone."""
    is_sampled: Callable[[int], bool]
    """Returns whether a step, counted from 1, is sampled: on all ranks alike."""

    @property
    def stored(self) -> dict[str, Any]:
        """The parts with a state of their own, by their key in the monitor's state."""
        return {
            "losses": self.observer.losses,
            "non_finite": self.detector,
            "step_length": self.step_length.rates,
            "rate_jumps": self.settings.jumps,
            "decay_jumps": self.settings.decay_jumps,
            "usual_updates": self.settings,
            "parts": self.updates.parts,
            "guard": self.guard,
            "schedule": self.schedule,
        }


def make_parts(
    model: nn.Module,
    optimizer: Any,
    lr_scheduler: Any,
    config: StabilityConfig,
    boundary: ErrorBoundary,
    *,
    run_dir: Path | None,
    is_writer: bool,
    reduce_ranks: bool,
    stage: int | None,
    grad_scaler: Any,
    on_issue: OnIssue | None,
    framework: str,
) -> MonitorParts:
    """Make the parts of a monitor; nothing is put into the model yet.

    Args:
        model: the model that trains.
        optimizer: its optimizer or optimizers; None without any.
        lr_scheduler: its scheduler or schedulers.
        config: the settings.
        boundary: counts what fails in any part.
        run_dir: the folder of the records.
        is_writer: this process writes to the sinks.
        reduce_ranks: reduce sampled steps over all ranks.
        stage: the pipeline stage that this rank is; None to find out.
        grad_scaler: the gradient scaler; None to find it.
        on_issue: called with each issue, where this process writes.
        framework: ``transformers``, ``lightning`` or ``loop``.
    """
    clock = StepClock(boundary)
    schedule = make_schedule(config.schedule, config.log_every, config.max_overhead)
    recorder = Recorder(
        config.make_sinks() if is_writer else [],
        run_dir,
        boundary,
        IssueFunction(on_issue, model, clock) if on_issue and is_writer else None,
        report=config.report,
    )
    optimizers = OptimizerAdapter(optimizer, grad_scaler)
    run = TrainingRun(
        model,
        optimizers.optimizer,
        lr_scheduler,
        optimizers.grad_scaler,
        run_dir=run_dir,
        audit=weakly(recorder.write_intervention),
    )
    guard = Guard(
        run,
        proposed_interventions(config),
        config.make_budget(),
        automatic=bool(config.interventions),
    )
    observer = StepObserver(model, config, clock, optimizers.scale)
    exchange = RankExchange() if reduce_ranks and world_size() > 1 else None
    ranks = None if exchange is None else RankReducer(model, exchange, config.log_every, stage)
    run.exchange = exchange

    def is_sampled(step: int) -> bool:
        if exchange is not None and exchange.together:
            return step >= exchange.agenda
        return schedule.wants(step)

    detector = NonFiniteDetector(model, boundary.failed, ranks.share if ranks else None, optimizers)
    step_length = StepLength(
        optimizers, run.scheduled_rate, lambda: run.rate_factors, boundary, model
    )
    run.shorten_step = weakly(step_length.shorten) if world_size() == 1 else None
    parts = PartChanges(model, weakly(run.edited_layers))
    run.on_rollback += [
        weakly(step_length.rolled_back),
        weakly(detector.rolled_back),
        weakly(parts.rolled_back),
    ]
    updates = WeightUpdates(optimizers, run.scheduled_rate, observer.measurements, boundary, parts)
    run.before_edit.append(weakly(updates.measure_now))
    settings = SettingWatch(optimizers, run, step_length.rates, model, updates)
    every_step: list[StepListener] = [detector, step_length, settings]
    usage = Usage(model, optimizers, config.log_every, is_sampled, framework)
    clock.listeners = [usage, updates, *(every_step if config.watch_every_step else []), guard]
    readings = ReadingBuilder(
        observer,
        optimizers,
        detector,
        step_length.rates,
        lambda: run.rate_factors,
        lambda: settings.decays,
        boundary,
        recorder.amend,
        schedule,
    )
    readings.ranks, readings.exchange = ranks, exchange
    contexts = StepContexts(observer, optimizers, is_sampled, config.watch_every_step, boundary)
    return MonitorParts(
        optimizers,
        recorder,
        guard,
        clock,
        observer,
        detector,
        step_length,
        settings,
        updates,
        usage,
        readings,
        contexts,
        schedule,
        exchange,
        is_sampled,
    )


def dense_interval(config: StabilityConfig) -> int:
    """Return the steps between samples while an issue is open."""
    return min(SHORTEST, config.log_every) if config.schedule == "adaptive" else config.log_every


JUDGED = LooksBack(
    dict.fromkeys(("max_logit", "normalized_entropy", "saturated_fraction"), EVERY_READING),
    frozenset({"max_logit", "normalized_entropy"}),
)
"""Part of the history that the risk and interventions look at."""


def make_tracker(
    config: StabilityConfig, boundary: ErrorBoundary, *, is_shown: bool = True
) -> IssueTracker:
    """Make the tracker of a configuration's rules, with an empty history.

    Args:
        config: the settings.
        boundary: counts what fails.
        is_shown: the whole history is kept, for records and for people. If False, of a model of
            very many heads only what rules and interventions look at: they then find the same.
    """
    rules = config.make_rules()
    looks = [getattr(each, "looks_back", lambda: None)() for each in rules]
    known = [each for each in looks if each is not None]
    looks_back = (
        None if is_shown or len(known) < len(looks) else functools.reduce(or_, known, JUDGED)
    )
    return IssueTracker(
        rules,
        history=History(config.history, looks_back=looks_back),
        clear_after=config.clear_after,
        cooldown_steps=config.cooldown * dense_interval(config),
        on_error=functools.partial(boundary.failed, "rule"),
        judge=RiskJudge(config.false_alarm_rate),
    )
