"""The monitor: samples steps, asks rules about each reading, and passes answers to sinks and guard.

It knows no signal, rule, sink or intervention by name. :mod:`stabmon.listeners` shows the moments
of a step; :class:`~stabmon.engine.clock.StepClock` fires them to the listeners: weight updates,
non-finite detector, step length, guard. After a sampled step::

    reading -> rules -> issues -> sinks -> interventions -> Diagnosis
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon._torch.process_group import rank, world_size
from stabmon.config import StabilityConfig, load_config
from stabmon.diagnosis import Diagnosis
from stabmon.engine import monitor_state
from stabmon.engine.clock import Phase, StepClock
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.rank_reducer import RankReducer
from stabmon.engine.reading_builder import ReadingBuilder
from stabmon.engine.recorder import Recorder
from stabmon.engine.run_metadata import run_meta
from stabmon.engine.step_length.watch import StepLength
from stabmon.engine.step_observer import StepObserver
from stabmon.engine.weight_updates import UpdatesOfStep, WeightUpdates
from stabmon.guard import Guard
from stabmon.interventions import Applied, Intervention, TrainingRun
from stabmon.listeners import StepContext, StepListener
from stabmon.nonfinite.detector import NonFiniteDetector
from stabmon.records import Reading, StabilityIssue
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.sinks import Sink

logger = logging.getLogger("stabmon")


class AttentionStabilityMonitor:
    """Monitor of the attention of a model in training.

    Call :meth:`on_step` once after each optimizer step, and :meth:`close` (or leave the context) at
    the end. Training is not changed unless the configuration names interventions, and nothing here
    raises into the training loop but bad arguments to the constructor.

    Args:
        model: the model as it is called in training: plain, compiled, wrapped by DDP or FSDP.
        optimizer: the torch optimizer, a wrapper around one, or a list of all. Failing batches are
            replayed just before its step, and learning rates are read from it; both are left out
            without one.
        lr_scheduler: the scheduler, or a list; a rollback with ``rewind_schedule`` sets it back.
        config: a preset's name, a YAML file's path, or a :class:`~stabmon.config.StabilityConfig`.
        log_every: sample every N-th optimizer step, so that N = 50 samples 50, 100, ...
        sinks: names or :class:`~stabmon.sinks.Sink` objects, instead of the configuration's.
        run_dir: records go to ``<run_dir>/stabmon``; None keeps them in memory only.
        reduce_ranks: under torch.distributed, reduce sampled steps over all ranks. Every rank must
            then have a monitor; interventions need it, since all ranks must do the same.
        is_writer: this process writes to the sinks; None for rank 0 only.
        manual_steps: :meth:`begin_step` and :meth:`before_optimizer_step` are called from outside,
            as the integrations do.
        grad_scaler: the gradient scaler in use; None to find it, if there is one.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for a configuration, name or value that cannot be, naming it and the mend.
        TypeError: if ``model`` is no ``nn.Module``.

    Example:
        >>> import stabmon, torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> monitor = stabmon.AttentionStabilityMonitor(layer, optimizer, log_every=1, sinks=[])
        >>> with monitor:
        ...     loss = layer(torch.randn(2, 5, 8)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     diagnosis = monitor.on_step(loss)
        >>> diagnosis.step, sorted(diagnosis.stats)
        (1, ['self_attn'])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        config: str | Path | StabilityConfig | None = "observe",
        *,
        log_every: int | None = None,
        sinks: Sequence[str | Sink] | None = None,
        run_dir: str | Path | None = None,
        reduce_ranks: bool = False,
        is_writer: bool | None = None,
        manual_steps: bool = False,
        grad_scaler: Any = None,
        **overrides: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}: give the torch.nn.Module that is trained"
            )
        self.config = load_config(config, log_every=log_every, sinks=sinks, **overrides)
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.step = 0
        """Optimizer steps seen, those before a resume included."""
        self.run_dir = None if run_dir is None else Path(run_dir) / "stabmon"
        self.boundary = ErrorBoundary()
        writes = rank() == 0 if is_writer is None else is_writer
        own_sinks = self.config.make_sinks() if writes else []
        self._recorder = Recorder(own_sinks, self.run_dir, self.boundary)
        self._tracker = self._make_tracker()
        self._manual, self._is_resumed = manual_steps, False
        self._optimizers = OptimizerAdapter(optimizer, grad_scaler)
        run = TrainingRun(
            model,
            self._optimizers.optimizer,
            lr_scheduler,
            self._optimizers.grad_scaler,
            run_dir=self.run_dir,
            audit=self._recorder.write_intervention,
        )
        self._guard = Guard(
            run,
            self.config.make_interventions(),
            self.config.make_budget(),
            automatic=bool(self.config.interventions),
        )
        self._clock = StepClock(self.boundary)
        self._observer = StepObserver(model, self.config, self._clock, self._optimizers.scale)
        ranks = RankReducer(model) if reduce_ranks else None
        self._detector = NonFiniteDetector(
            model, self.boundary.failed, ranks.share if ranks else None, self._optimizers
        )
        self._step_length = StepLength(
            self._optimizers, run.scheduled_rate, lambda: run.rate_factors, self.boundary, model
        )
        run.shorten_step = self._step_length.shorten if world_size() == 1 else None
        run.on_rollback.append(lambda step: self._step_length.rates.begin_again())
        self._updates = WeightUpdates(
            self._optimizers, run.scheduled_rate, self._observer.measurements
        )
        every_step: list[StepListener] = [self._detector, self._step_length]
        self._clock.listeners = [
            self._updates,
            *(every_step if self.config.watch_every_step else []),
            self._guard,
        ]
        self._readings = ReadingBuilder(
            self._observer,
            self._optimizers,
            self._detector,
            self._step_length.rates,
            lambda: run.rate_factors,
            self.boundary,
            self._recorder.amend,
        )
        self._readings.ranks = ranks
        self._scaled = self._optimizers.scales
        self._stepping: set[int] = set()
        """Optimizers that are about to step or have, by id, in this step."""
        self._made = (0, 0)
        """Forwards and losses of this step at the last ``before_optimizer_step``."""
        if not manual_steps:
            self.begin_step()

    # -- the moments of a step

    @contained
    def begin_step(self) -> None:
        """Prepare for the next optimizer step; only integrations call this.

        In a loop of one's own the constructor and :meth:`on_step` do.
        """
        self._stepping.clear()
        self._optimizers.start_step()
        if self._clock.phase is Phase.CLOSED:
            return
        self._open()
        self._optimizers.scalers.watch()
        if not self._manual:
            self._optimizers.before_step(self.before_optimizer_step)
        self._start_observing()

    @contained
    def before_optimizer_step(self, optimizer: Any = None) -> None:
        """Inspect gradients while they and the weights that made them are still there.

        Args:
            optimizer: the one that is about to step, where there are several. The same again
                without a forward in between is one step, as where an optimizer's step calls its
                parent's.
        """
        seen = self._observer
        made = (seen.forwards.count, len(seen.losses.parts))
        is_first, is_new = not self._stepping, made != self._made
        closed = self._clock.phase is Phase.CLOSED
        if closed or is_capturing() or (id(optimizer) in self._stepping and not is_new):
            return
        self._stepping.add(id(optimizer))
        self._made = made
        sampled = self.is_sampled(self.step + 1)
        measured = sampled and self.config.watch_every_step and (is_first or is_new)
        ctx = StepContext(
            self.step + 1,
            sampled,
            forwards=seen.forwards.calls,
            losses=seen.losses.parts,
            gradient_norm=seen.gradients.get("") if measured else None,
            optimizer=optimizer,
            is_first=is_first,
            has_new_gradients=is_new,
        )
        self._clock.before_optimizer_step(ctx)

    def on_step(self, loss: Tensor | float | None = None) -> Diagnosis | None:
        """Report that an optimizer step has been made.

        Args:
            loss: the step's loss; a tensor is detached, and read only when a sampled step needs it.

        Returns:
            A :class:`~stabmon.records.Diagnosis` on sampled steps, on a step at which a NaN or inf
            first comes up, and on one which shows that the rate is too high; else None.
        """
        if self._clock.phase is Phase.CLOSED:
            return None
        self.step += 1
        self._begin_records()
        ctx = self._end_step(loss) or StepContext(self.step, self.is_sampled(self.step))
        self._clock.on_step_end(ctx)
        updates = self._measure_updates(ctx) or UpdatesOfStep()
        diagnosis = self._diagnose(ctx, updates)
        if ctx.sampled or (diagnosis is not None and world_size() == 1):
            self._intervene(diagnosis)
        self._observer.forget()
        if not self._manual:
            self.begin_step()
        return diagnosis

    def is_sampled(self, step: int) -> bool:
        """Return whether optimizer step ``step``, counted from 1, is sampled."""
        return step % self.config.log_every == 0

    @contained
    def get_intervention(self, diagnosis: Diagnosis) -> Intervention | None:
        """Propose an intervention for the open alarms of a diagnosis.

        Args:
            diagnosis: what :meth:`on_step` returned.

        Returns:
            One that the configuration allows, or, where it names none, one that the preset
            ``guard`` allows; None where nothing is to be done, or nothing left that was not tried.
        """
        if not self._guard.policy.interventions:
            preset = load_config("guard")
            self._guard.allow(preset.make_interventions(), preset.make_budget())
        with self._clock.own_work():
            return self._guard.get_intervention(diagnosis.open_issues)

    @contained
    def apply(self, intervention: Intervention, *, hold: bool | None = None) -> Applied | None:
        """Apply an intervention, after the optimizer's step.

        It stays until its ``undo()`` or ``release()``: stabmon does not judge it by later batches,
        take it back, loosen it or release it, under any configuration. Its effect is proven on the
        step's own batch, run again before and after; without that batch it is not judged, and
        ``record["note"]`` says so. Under torch.distributed, every rank must apply the same.

        Args:
            intervention: the intervention.
            hold: True to hold it from step to step until it is undone or released. False to do it
                once and release it: a change of weights is made once, and a rate, temperature or
                cap is in force for one optimizer step. None for the intervention's own way, which
                for most is to hold.

        Returns:
            A record of it, whose ``undo()`` takes it back. None where it does not fit this run; the
            log and the audit record in ``interventions.jsonl`` say why.
        """
        run, seen = self._guard.run, self._observer
        run.step, run.forwards = self.step, seen.forwards.calls or seen.last_forward
        try:
            with self._clock.own_work():
                applied = self._guard.apply(intervention, by_hand=True, hold=hold)
        finally:
            run.forwards = ()
        if not self._manual:
            self._start_observing()
        return applied

    @property
    def issues(self) -> list[StabilityIssue]:
        """Every issue emitted so far, in order."""
        return self._recorder.issues

    @property
    def applied(self) -> tuple[Applied, ...]:
        """Every intervention applied so far, in order."""
        return tuple(self._guard.run.applied)

    @property
    def stop_reason(self) -> str | None:
        """The reason to stop training now, where an intervention gives one; None to go on."""
        return self._guard.stop_reason

    @property
    def errors(self) -> Counter[str]:
        """Failures inside stabmon, by place; each is logged the first time."""
        return self.boundary.errors

    @property
    def unseen(self) -> Mapping[str, str]:
        """Modules with attention that is not seen, by name, in words; from the first sample on."""
        return dict(self._observer.unseen)

    @property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """Every issue open now, as last emitted."""
        return self._tracker.open_issues

    def close(self) -> None:
        """Leave the model as it was found and close the sinks; may be called twice."""
        if self._clock.phase is Phase.CLOSED:
            return
        self._clock.close()
        self._observer.close()
        self._optimizers.let_go()
        self._recorder.close()

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed monitor needs to go on: plain values.

        They are for ``torch.save``, or for JSON with NaN.
        """
        return {
            "version": monitor_state.STATE_VERSION,
            "model": monitor_state.attention_of(self.model, self._tracker.history.layers),
            "step": self.step,
            "last_reading": self._readings.last_step,
            "issues": [issue.to_dict() for issue in self.issues],
            "tracker": self._tracker.state_dict(),
            "losses": self._observer.losses.state_dict(),
            "non_finite": self._detector.state_dict(),
            "step_length": self._step_length.rates.state_dict(),
            "guard": self._guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        The state is read whole before anything is changed. Interventions, settings, signals and
        rules that are no longer known are left out with a warning, and the rest is taken.

        Args:
            state: what :meth:`state_dict` returned, in this version or an earlier one.

        Raises:
            ValueError: if ``state`` is no monitor's state, one of another model, or of a later
                version of stabmon; nothing has changed then.
        """
        tracker = self._make_tracker()
        saved = monitor_state.parse(
            state,
            self.model,
            tracker,
            {
                "losses": self._observer.losses.parse_state,
                "non_finite": self._detector.parse_state,
                "step_length": self._step_length.rates.parse_state,
                "guard": self._guard.parse_state,
            },
        )
        self._resume(saved, tracker)

    @contained
    def _resume(self, saved: monitor_state.SavedState, tracker: IssueTracker) -> None:
        self._open()
        self.step, self._readings.last_step = saved.step, saved.last_reading
        self._tracker, self._is_resumed = tracker, True
        self._recorder.issues, self._recorder.alarms = [], 0
        self._recorder.keep(saved.issues)
        self._guard.run.step, self._guard.run.history = saved.step, tracker.history
        if saved.left_out:
            logger.warning("Left out of the resumed state: %s", "; ".join(saved.left_out))
        for restore in saved.restore:
            restore()
        if not self._manual:
            self.begin_step()

    # -- for integrations

    @contained
    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the loss that is differentiated.

        Args:
            loss: a scalar tensor; the shares of a step are added up.
        """
        self._observer.losses.tell(loss)

    def leave_ranks(self) -> None:
        """Report this rank's readings alone, before the first step: not every rank has a monitor."""
        self._readings.ranks = None
        self._detector.report_alone()

    # -- inside a step

    @contained
    def _begin_records(self) -> None:
        self._recorder.begin()

    @contained
    def _end_step(self, loss: Tensor | float | None) -> StepContext:
        """Close the capture and the loss, and drop gradient norms that a scaler has spoilt."""
        seen = self._observer
        seen.stop_capture()
        micro_batches = len(seen.losses.parts) or seen.forwards.count
        calls, ended = seen.forwards.calls, self._end_loss(loss)
        left_out = self._optimizers.left_out()
        scaled, self._scaled = self._scaled, self._optimizers.scales
        bad = left_out is True and not math.isfinite(seen.gradients.get("", 0.0))
        if scaled != self._scaled or bad:
            # a scale that was not known is in them, or they have changed nothing
            seen.forget_gradients()
        self._guard.run.grad_scaler = self._optimizers.grad_scaler  # found in the meantime, maybe
        return StepContext(
            self.step,
            self.is_sampled(self.step),
            forwards=calls,
            loss=ended,
            micro_batches=micro_batches,
            was_skipped=left_out,
        )

    @contained
    def _end_loss(self, loss: Tensor | float | None) -> float | Tensor | None:
        shares = self._observer.forwards.shares
        return self._observer.losses.end_step(self.step, loss, shares=shares)

    @contained
    def _measure_updates(self, ctx: StepContext) -> UpdatesOfStep | None:
        return self._updates.measure() if ctx.sampled else None

    @contained
    def _diagnose(self, ctx: StepContext, updates: UpdatesOfStep) -> Diagnosis | None:
        """Make the step's reading, run the rules on it and write both to the sinks."""
        reading = self._readings.build(
            ctx,
            updates,
            has_news=self._clock.has_news,
            watches_losses=self.config.watch_every_step,
        )
        if reading is None:
            return None
        issues = self._tracker.update(reading)
        self._recorder.keep(issues)
        open_issues = self._tracker.open_issues
        if ctx.sampled:
            self._write(reading, open_issues)
        self._recorder.write_issues(issues)
        return Diagnosis(
            reading.step,
            tuple(issues),
            reading.layers,
            tuple(self._tracker.history.readings),
            open_issues,
            dict(self._observer.unseen),
        )

    def _write(self, reading: Reading, open_issues: Sequence[StabilityIssue]) -> None:
        factor = self._guard.run.rate_factor
        shown = self._guard.automatic or factor != 1
        more = {"learning_rate_factor": factor} if shown else {}
        self._recorder.write_reading(reading, open_issues, **more)

    @contained
    def _intervene(self, diagnosis: Diagnosis | None) -> None:
        """Let the guard judge and act; on all ranks alike, also on one without a diagnosis."""
        run, history = self._guard.run, self._tracker.history
        run.layers = {**run.layers, **self._observer.measurements.modules}
        run.history = history
        run.uneasy = self.config.watch_every_step and self._step_length.rates.uneasy
        open_issues = self._tracker.open_issues
        if any(issue.is_alarm for issue in open_issues):
            run.forwards = self._observer.forwards.calls
        newest = history.latest if len(history) else None
        fine = (
            newest is not None and newest.non_finite is None and math.isfinite(newest.loss or 0.0)
        )
        with self._clock.own_work():
            self._guard.intervene(open_issues, healthy=fine and diagnosis is not None)

    # -- set-up

    def _make_tracker(self) -> IssueTracker:
        return IssueTracker(
            self.config.make_rules(),
            history=History(self.config.history),
            clear_after=self.config.clear_after,
            cooldown_steps=self.config.cooldown * self.config.log_every,
            on_error=functools.partial(self.boundary.failed, "rule"),
        )

    def _open(self) -> None:
        """Open the sinks and prepare the guard; once, before the first step."""
        if self._clock.phase is not Phase.NEW:
            return
        self._clock.phase = Phase.TRAINING
        self._recorder.open(self._describe_run)
        self._guard.begin(ranks_agree=self._readings.ranks is not None)

    def _describe_run(self) -> Mapping[str, Any]:
        continues = self._is_resumed or self.step > 1
        return {**run_meta(self.model, self.config), "continues": continues}

    def _start_observing(self) -> None:
        ctx = StepContext(self.step + 1, self.is_sampled(self.step + 1))
        self._clock.on_step_begin(ctx)
        every = self.config.watch_every_step or self._clock.wants_attention
        self._observer.start(ctx.step, sampled=ctx.sampled, watched=ctx.sampled or every)
