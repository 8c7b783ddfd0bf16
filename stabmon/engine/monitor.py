"""The engine: when to sample, whom to ask, and where the answers go. Knows no signal, rule or sink
by name.

One optimizer step, with what a monitor does at each mark::

    begin_step()             <- wait for forwards
      forward (micro-batch)  <- if sampled: capture attention calls, reduce each to one number a head
      backward               <- if sampled: gradient norms, before they are clipped
      …                         more micro-batches
    before_optimizer_step()  <- replay the forwards, if something is not finite
      optimizer.step()
    on_step(loss)            <- if sampled: one reading -> rules -> issues -> sinks -> interventions -> Diagnosis

Interventions that are held are told of every mark.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from stabmon._storage.stored_value import Stored
from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon.config import StabilityConfig, load_config
from stabmon.diagnosis import Diagnosis
from stabmon.engine.acting import Acting, paused
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.group_updates import GroupUpdates
from stabmon.engine.monitor_state import (
    STATE_VERSION,
    attention_of,
    check_model,
    check_version,
    known_issues,
)
from stabmon.engine.qk_updates import QKUpdates, with_adapters
from stabmon.engine.rank_reducer import RankReducer, rank, world_size
from stabmon.engine.recorder import Recorder
from stabmon.engine.run_metadata import run_meta
from stabmon.engine.step_length.watch import StepLength
from stabmon.engine.step_observer import StepObserver
from stabmon.interventions import Applied, Intervention
from stabmon.nonfinite.detector import NonFiniteDetector
from stabmon.records import QKUpdate, Reading, StabilityIssue
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.signals import SIGNALS
from stabmon.signals.accumulator import to_host
from stabmon.sinks import Sink

logger = logging.getLogger("stabmon")


class AttentionStabilityMonitor:
    """Watches the attention of a model in training, and changes nothing about it unless the
    configuration names interventions.

    Call :meth:`on_step` once after each optimizer step and :meth:`close` (or leave the context) at
    the end. Nothing here raises into the training loop but bad arguments to the constructor.

    Args:
        model: the model as it is called in training: plain, compiled, wrapped by DDP or FSDP.
        optimizer: the torch optimizer, a wrapper around one, or a list of all where there are
            several. Just before its step is when failing batches are replayed; without one none is.
            Of what an optimizer steps that is not given, rates are unknown.
        lr_scheduler: what a rollback with ``rewind_schedule`` sets back, or a list; its rates are
            read from the optimizer.
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step; the first is step 1, so N = 50 samples 50, 100,
            …
        sinks: names or :class:`~stabmon.sinks.Sink` objects, instead of the configuration's.
        run_dir: records go to ``<run_dir>/stabmon``; None keeps them in memory only.
        reduce_ranks: under torch.distributed, reduce sampled steps over all ranks. Every rank must
            then have a monitor; interventions need it, since all ranks must do the same.
        is_writer: whether this process writes to the sinks; None for rank 0 only.
        manual_steps: :meth:`begin_step` and :meth:`before_optimizer_step` are called from outside,
            as the integrations do.
        grad_scaler: the gradient scaler in use, whose single overflows are not reported and whose
            scale is taken out of gradient norms; None to find it, if there is one.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for a configuration, name or value that cannot be, naming it and the mend.
        TypeError: if ``model`` is no ``nn.Module``.
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
        self._recorder = Recorder(
            self.config.make_sinks() if writes else [], self.run_dir, self.boundary
        )
        self._tracker = self._make_tracker()
        self._ranks = RankReducer(model) if reduce_ranks else None
        self._view = OptimizerAdapter(optimizer, grad_scaler)
        audit = self._recorder.write_intervention
        self._acting = Acting(model, self._view, lr_scheduler, self.config, self.run_dir, audit)
        run = self._acting.run
        self._step_length = StepLength(
            model, self._view, run.scheduled_rate, lambda: run.rate_factors, self.boundary
        )
        run.shorten_step = self._step_length.shorten if world_size() == 1 else None
        run.on_rollback.append(lambda step: self._step_length.rates.begin_again())
        follow, drop = self._step_length.follow, self._step_length.end
        self._observer = StepObserver(
            model, self.config, self.boundary, self._view.scale, self._acting.listener, follow, drop
        )
        self._query_key, self._group_updates = QKUpdates(), GroupUpdates()
        share = self._ranks.share if self._ranks else None
        self._misfortune = NonFiniteDetector(model, self.boundary.failed, share, self._view)
        self._scaled = self._view.scales
        self._manual = manual_steps
        self._last_reading = self._unseen_told = 0
        self._opened = self._closed = self._is_news = self._resumed = False
        self._looked: set[int] = set()
        """Optimizers that are about to step or have, by id, in this step."""
        self._made = (0, 0)
        """Forwards and losses of this step when they were looked at last."""
        if not manual_steps:
            self.begin_step()

    # -- the marks of a step

    @contained
    def begin_step(self) -> None:
        """Get ready for the next optimizer step. Only integrations call this: ``on_step`` does it
        in a loop of one's own.
        """
        self._is_news = False
        self._looked.clear()
        self._view.start_step()
        if self._closed:
            return
        self._open()
        self._view.scalers.watch()
        if not self._manual:
            self._view.before_step(self.before_optimizer_step)
        self._start_observing()

    def before_optimizer_step(self, optimizer: Any = None) -> None:
        """Look at gradients while they and the parameters that made them are still there.

        Args:
            optimizer: the one that is about to step, where there are several. What comes again
                without a forward in between is one step, as where an optimizer's step calls its
                parent's.
        """
        made = (self._observer.forwards.count, len(self._observer.losses.parts))
        is_first, is_new = not self._looked, made != self._made
        if self._closed or (id(optimizer) in self._looked and not is_new):
            return
        self._looked.add(id(optimizer))
        self._made = made
        self._look_at_weights(optimizer, is_first)
        if (
            is_first or is_new
        ):  # with several optimizers, gradients may be made anew between their steps
            self._look_at_gradients()
        self._acting.guard.before_optimizer_step()

    @contained
    def _look_at_weights(self, optimizer: Any, is_first: bool) -> None:
        if not self.is_sampled(self.step + 1):
            return
        seen = self._observer.measurements
        self._view.note_rates(optimizer, self._acting.run.scheduled_rate)
        if is_first:
            self._group_updates.before(self._view.groups())
        self._query_key.before(seen.modules, seen.info, again=not is_first)

    @contained
    def _look_at_gradients(self) -> None:
        seen, sampled = self._observer, self.is_sampled(self.step + 1)
        if self.config.watch_every_step:
            norm = seen.gradients.get("") if sampled else None
            gradients = not self._view.skips_bad_steps
            with paused(seen):
                calls, losses = seen.forwards.calls, seen.losses.parts
                self._is_news |= self._misfortune.look(
                    self.step + 1, calls, losses, gradients=gradients, norm=norm
                )

    def on_step(self, loss: Tensor | float | None = None) -> Diagnosis | None:
        """Take note that an optimizer step has been made.

        Args:
            loss: the step's loss; a tensor is detached, and read only when a sampled step needs it.

        Returns:
            A :class:`~stabmon.diagnosis.Diagnosis` on sampled steps, and on a step at which a NaN or
            inf first comes up or which shows that the rate is too high; else None.
        """
        if self._closed:
            return None
        self.step += 1
        self._begin_records()
        self._observer.stop_capture()
        micro_batches = len(self._observer.losses.parts) or self._observer.forwards.count
        calls = self._observer.forwards.calls
        ended = self._end_loss(loss)
        self._look_at_end(ended, calls)
        self._look_at_length(ended)
        self._tell_held(micro_batches)
        moved, updates = self._look_at_update() or ({}, {})
        diagnosis = self._finish_step(micro_batches, moved, updates)
        if self.is_sampled(self.step) or (diagnosis is not None and world_size() == 1):
            self._act(diagnosis)
        self._observer.forget()
        if not self._manual:
            self.begin_step()
        return diagnosis

    def is_sampled(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 1, is sampled."""
        return step % self.config.log_every == 0

    @contained
    def get_intervention(self, diagnosis: Diagnosis) -> Intervention | None:
        """What to do next about the alarms that are open; None where there is nothing to do, or
        nothing left that was not tried.

        Proposes what the configuration allows, or, where it names no interventions, what the preset
        ``guard`` allows.
        """
        return self._acting.propose(diagnosis, self._observer)

    @contained
    def apply(self, intervention: Intervention, *, hold: bool | None = None) -> Applied | None:
        """Apply an intervention, after the optimizer's step; its ``undo()`` takes it back.

        What is applied here stays until its ``undo()`` or ``release()``: nothing of stabmon judges
        it by later batches, takes it back, loosens it or lets it go, under any configuration. Its
        effect is proven on the step's own batch, run again before and after; where that batch is
        not to be had it is not judged, and ``record["note"]`` says so. Under torch.distributed,
        every rank must apply the same.

        Args:
            intervention: what to do.
            hold: True to hold it from step to step until it is undone or released. False to do it
                once and let it go: a change of weights is made once, and what is in force only
                while it is held (a rate, a temperature, a cap) is in force for one optimizer step.
                None for the intervention's own way, which for most is to hold.

        Returns:
            None where it does not fit this run; the log and the audit record in
            ``interventions.jsonl`` say why.
        """
        applied = self._acting.apply(intervention, self.step, self._observer, hold)
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
        return tuple(self._acting.run.applied)

    @property
    def stop_reason(self) -> str | None:
        """Why training should stop now, where an intervention says so; None to go on."""
        return self._acting.stop_reason

    @property
    def errors(self) -> Counter[str]:
        """What failed inside, by place; each is logged the first time."""
        return self.boundary.errors

    @property
    def unseen(self) -> Mapping[str, str]:
        """Modules of whose attention some is not seen, and what of it: name -> words. Known from
        the first sampled step on.
        """
        return dict(self._observer.unseen)

    @property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """Every issue open now, as last emitted."""
        return self._tracker.open_issues

    def close(self) -> None:
        """Leave the model as it was found and close the sinks; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._acting.close()
        self._observer.let_go()
        self._step_length.let_go()
        self._view.let_go()
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
        """All that a resumed monitor needs to go on where this one is: plain values, for JSON with
        NaN or ``torch.save``.
        """
        return {
            "version": STATE_VERSION,
            "model": attention_of(self.model, self._tracker.history.layers),
            "step": self.step,
            "last_reading": self._last_reading,
            "issues": [issue.to_dict() for issue in self.issues],
            "tracker": self._tracker.state_dict(),
            "losses": self._observer.losses.state_dict(),
            "non_finite": self._misfortune.state_dict(),
            "step_length": self._step_length.rates.state_dict(),
            "guard": self._acting.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        The state is read whole before anything is changed. Interventions, settings, signals and
        rules that are no longer known are left out, which is told of, and the rest is taken.

        Raises:
            ValueError: if ``state`` is no monitor's state, one of another model, or of a later
                version of stabmon; nothing has changed then.
        """
        self._take_up(self._parse_state(state))

    def _parse_state(self, state: Mapping[str, Any]) -> list[Callable[[], None]]:
        """What takes up each part of a state, in order; changes nothing."""
        saved, tracker = Stored(state), self._make_tracker()
        check_version(saved)
        try:
            tracker.load_state_dict(saved["tracker"], SIGNALS)
            issues = known_issues(saved["issues"], tracker)
            step, last_reading = saved["step"].integer(), saved["last_reading"].integer()
            losses = self._observer.losses.parse_state(saved["losses"])
            misfortune = self._misfortune.parse_state(saved["non_finite"])
            lengths = self._step_length.rates.parse_state(saved.get("step_length", None))
            guard = self._acting.guard.parse_state(saved["guard"])
            told = (
                {name: each.mapping() for name, each in saved["model"].items()}
                if "model" in saved
                else None
            )
        except Exception as error:
            words = " ".join(
                f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{error}".split()
            )
            raise ValueError(
                f"no monitor's state ({words}): give what state_dict() returned"
            ) from error
        check_model(self.model, tracker.history.layers, told)

        def take_up() -> None:
            self.step, self._last_reading, self._tracker = step, last_reading, tracker
            self._recorder.issues, self._recorder.alarms = [], 0
            self._recorder.keep(issues)
            self._resumed = True
            self._acting.run.step, self._acting.run.history = step, tracker.history
            if saved.left_out:
                logger.warning("Left out of the resumed state: %s", "; ".join(saved.left_out))

        return [self._open, take_up, losses, misfortune, lengths, guard]

    @contained
    def _take_up(self, parts: Sequence[Callable[[], None]]) -> None:
        for take_up in parts:
            take_up()
        if not self._manual:
            self.begin_step()

    # -- for integrations

    @contained
    def add_loss(self, loss: Tensor) -> None:
        """Tell the (part of the) step's loss that a micro-batch is differentiated by; parts are
        added up.
        """
        self._observer.losses.tell(loss)

    def leave_ranks(self) -> None:
        """Report this rank's readings alone, since not every rank has a monitor. To be called
        before the first step.
        """
        self._ranks, self._misfortune = (
            None,
            NonFiniteDetector(self.model, self.boundary.failed, optimizer=self._view),
        )

    # -- inside a step

    @contained
    def _begin_records(self) -> None:
        self._recorder.begin()

    @contained
    def _end_loss(self, loss: Tensor | float | None) -> float | Tensor | None:
        return self._observer.losses.end_step(
            self.step, loss, shares=self._observer.forwards.shares
        )

    @contained
    def _look_at_end(self, loss: float | Tensor | None, calls: Sequence[ForwardCall]) -> None:
        seen, left_out = self._observer, self._view.left_out()
        scaled, self._scaled = self._scaled, self._view.scales
        if scaled != self._scaled or (
            left_out is True and not math.isfinite(seen.gradients.get("", 0.0))
        ):
            # a scale that was not known is in them, or they have changed nothing
            seen.forget_gradients()
        if self.config.watch_every_step:
            with paused(seen):
                told = (
                    loss if isinstance(loss, float) else None
                )  # one on another device is known when a reading needs it
                self._is_news |= self._misfortune.end_step(self.step, told, calls, left_out)

    @contained
    def _look_at_length(self, loss: float | Tensor | None) -> None:
        if self.config.watch_every_step:
            with paused(self._observer):
                self._is_news |= self._step_length.finish(self.step, loss) is not None
            self._acting.run.uneasy = self._step_length.rates.uneasy

    @contained
    def _look_at_update(self) -> tuple[dict[str, QKUpdate], dict[str, float]]:
        if not self.is_sampled(self.step):
            return {}, {}
        return self._query_key.after(scaled=self._view.scales), self._group_updates.after()

    @contained
    def _finish_step(
        self, micro_batches: int, moved: Mapping[str, QKUpdate], updates: Mapping[str, float]
    ) -> Diagnosis | None:
        seen, sampled = self._observer, self.is_sampled(self.step)
        sums = seen.measurements.sums
        if (
            sampled and self._ranks is not None
        ):  # before all that may fail, since other ranks wait for it
            sums = self._ranks.reduce(sums)
        if not seen.forwards.count:
            seen.look_for_compiled()
        if not sampled and not self._is_news:
            return None
        layers = to_host(sums) if sampled else {}
        self._tell_unseen()
        if sampled and not layers and (why := seen.explain_missing_attention()):
            self.boundary.failed(
                "sampling", RuntimeError(f"step {self.step}: {why}"), traceback=False
            )
        losses, rates = seen.losses.take(), self._view.learning_rates()
        for step, loss in losses if self.config.watch_every_step else ():
            if not math.isfinite(loss):
                self._misfortune.note_loss(step, loss)
        reading = Reading(
            step=self.step,
            loss=losses[-1][1] if losses and losses[-1][0] == self.step else None,
            layers=layers,
            info=with_adapters(seen.measurements.info, seen.measurements.modules),
            learning_rate=max(rates.values(), default=None),
            gradients=seen.gradients,
            query_key=moved,
            losses=losses,
            micro_batches=max(1, micro_batches),
            non_finite=self._misfortune.found_since(self._last_reading),
            overshoot=self._step_length.rates.found_since(self._last_reading),
            sampled=sampled,
            overhead_fraction=self.boundary.overhead_fraction(),
            learning_rates=rates,
            rate_factors=self._acting.run.rate_factors,
            updates=updates,
        )
        self._last_reading = self.step
        return self._judge(reading, sampled)

    def _judge(self, reading: Reading, sampled: bool) -> Diagnosis:
        issues = self._tracker.update(reading)
        self._recorder.keep(issues)
        open_issues = self._tracker.open_issues
        if sampled:
            factor = self._acting.run.rate_factor
            more = (
                {"learning_rate_factor": factor}
                if self._acting.guard.automatic or factor != 1
                else {}
            )
            self._recorder.write_reading(reading, open_issues, **more)
        self._recorder.write_issues(issues)
        readings = tuple(self._tracker.history.readings)
        return Diagnosis(
            reading.step,
            tuple(issues),
            reading.layers,
            readings,
            open_issues,
            dict(self._observer.unseen),
        )

    def _tell_unseen(self) -> None:
        """Warn of attention that is not seen, and write it to the run's metadata, where more of it
        is known than at the last step.
        """
        unseen, told = self._observer.unseen, self._observer.describe_unseen()
        if told is None or len(unseen) == self._unseen_told:
            return
        self._unseen_told = len(unseen)
        if rank() == 0:
            logger.warning("%s", told)
        self._recorder.amend({"unseen_attention": dict(unseen)})

    @contained
    def _tell_held(self, micro_batches: int) -> None:
        self._acting.on_step(self.step, micro_batches, self._observer)

    @contained
    def _act(self, diagnosis: Diagnosis | None) -> None:
        self._acting.act(diagnosis, self._tracker, self._observer)

    # -- set-up and small things

    def _make_tracker(self) -> IssueTracker:
        return IssueTracker(
            self.config.make_rules(),
            history=History(self.config.history),
            clear_after=self.config.clear_after,
            cooldown_steps=self.config.cooldown * self.config.log_every,
            on_error=functools.partial(self.boundary.failed, "rule"),
        )

    def _open(self) -> None:
        """Once, before the first step: open the sinks, and put in place what has to be there before
        anything is wrong.
        """
        if self._opened:
            return
        self._opened = True
        self._recorder.open(
            lambda: {
                **run_meta(self.model, self.config),
                "continues": self._resumed or self.step > 1,
            }
        )
        self._acting.begin(together=self._ranks is not None)

    def _start_observing(self) -> None:
        sampled = self.is_sampled(self.step + 1)
        watched = sampled or self.config.watch_every_step or self._acting.guard.wants_attention
        self._observer.start(self.step + 1, sampled=sampled, watched=watched)
        if self.config.watch_every_step:
            self._step_length.begin(self.step + 1, probe=not self._observer.paused)
