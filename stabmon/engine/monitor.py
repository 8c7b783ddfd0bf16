"""Monitor a training run: sample steps, judge readings, let the guard intervene.

It knows no signal, rule, sink or intervention by name. :mod:`stabmon.listeners` lists the moments
of a step; :class:`~stabmon.engine.clock.StepClock` fires them to the weight updates, the non-finite
detector, the step length and the guard. After a sampled step::

    reading -> rules -> issues -> sinks -> interventions -> Diagnosis
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stabmon._torch.callbacks.weak_method import weakly
from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.process_group import rank, world_size
from stabmon.config import StabilityConfig, load_config
from stabmon.diagnosis import Diagnosis
from stabmon.engine import monitor_state
from stabmon.engine.clock import Phase
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.judge import judge
from stabmon.engine.monitor_parts import make_parts, make_tracker
from stabmon.engine.monitor_view import monitor_html, monitor_text
from stabmon.engine.ranks.step_exchanges import StepExchanges
from stabmon.engine.recording.issue_function import OnIssue, checked
from stabmon.engine.recording.run_metadata import run_meta
from stabmon.engine.updates.weight_updates import UpdatesOfStep
from stabmon.incidents import Incident
from stabmon.interventions import Applied, Intervention
from stabmon.listeners import StepContext
from stabmon.records import StabilityIssue
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
        log_every: sample every N-th optimizer step of a quiet run, so that N = 50 samples 50, 100,
            ...; the first steps, and those while something moves, are sampled more often, unless
            ``schedule="fixed"``.
        sinks: names or :class:`~stabmon.sinks.Sink` objects, instead of the configuration's.
        run_dir: records go to ``<run_dir>/stabmon``; None keeps them in memory only.
        on_issue: a function, called with each issue where this process writes; it cannot change
            training, and an exception in it is counted and logged once.
        reduce_ranks: under torch.distributed, reduce sampled steps over all ranks. Every rank must
            then have a monitor; interventions need it, since all ranks must do the same.
        stage: the pipeline stage that this rank is, from 0: ranks with the same number are replicas.
            None to tell stages apart by the names and bits of their weights, as is right but where
            stages have the same names and are never trained.
        is_writer: this process writes to the sinks; None for rank 0 only.
        manual_steps: :meth:`begin_step` and :meth:`before_optimizer_step` are called from outside,
            as the integrations do.
        grad_scaler: the gradient scaler in use; None to find it, if there is one.
        framework: ``transformers``, ``lightning`` or ``loop``: advice is in its terms.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for an invalid configuration, name or value, naming it and the fix.
        TypeError: if ``model`` is no ``nn.Module``, or ``on_issue`` cannot be called.

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
        on_issue: OnIssue | None = None,
        reduce_ranks: bool = False,
        stage: int | None = None,
        is_writer: bool | None = None,
        manual_steps: bool = False,
        grad_scaler: Any = None,
        framework: str = "loop",
        **overrides: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}: give the torch.nn.Module that is trained"
            )
        self.config = load_config(config, log_every=log_every, sinks=sinks, **overrides)
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.step = 0
        """Optimizer steps seen, those before a resume included."""
        folder = None if run_dir is None else Path(run_dir) / "stabmon"
        self.boundary = ErrorBoundary()
        self._manual, self._is_resumed = manual_steps, False
        self._framework = framework
        self._is_shown = (rank() == 0 or not reduce_ranks) if is_writer is None else is_writer
        self._tracker = make_tracker(self.config, self.boundary, is_shown=self._is_shown)
        self._parts = parts = make_parts(
            model,
            optimizer,
            lr_scheduler,
            self.config,
            self.boundary,
            run_dir=folder,
            is_writer=rank() == 0 if is_writer is None else is_writer,
            reduce_ranks=reduce_ranks,
            stage=stage,
            grad_scaler=grad_scaler,
            on_issue=checked(on_issue),
            framework=framework,
        )
        self._clock, self._contexts, self._observer = parts.clock, parts.contexts, parts.observer
        self._schedule = parts.schedule
        self._readings, self._recorder, self._guard = parts.readings, parts.recorder, parts.guard
        self._ranks = parts.exchange
        self._exchanges = StepExchanges(self._ranks, parts.readings, parts.guard, self.boundary)
        if self._ranks is not None:
            self._ranks.on_alone = weakly(self._left_alone)
        parts.guard.run.on_intervention_end.append(weakly(self._end_cooldowns))
        parts.guard.run.on_rollback.append(weakly(self._rolled_back))
        self._observer.on_first_forward = weakly(self._first_forward)
        if not manual_steps:
            self.begin_step()

    # -- the moments of a step

    @contained
    def begin_step(self) -> None:
        """Prepare for the next optimizer step; only integrations call this.

        In a loop of one's own the constructor and :meth:`on_step` do.
        """
        self._clock.reset_news()
        self._contexts.start_step()
        self._parts.optimizers.start_step()
        if self._clock.phase is Phase.CLOSED:
            return
        self._open()
        self._exchanges.leave_if_unsupported(self.model)
        self._schedule.begin_step(self.step + 1, self.boundary.seconds)
        self._exchanges.expect_first(lambda: self._schedule.first(self.step))
        self._parts.optimizers.scalers.watch()
        if not self._manual:
            self._parts.optimizers.before_step(
                self.before_optimizer_step,
                functools.partial(self.boundary.failed, "before_optimizer_step"),
            )
        self._start_observing()

    @contained
    def before_optimizer_step(self, optimizer: Any = None) -> None:
        """Inspect gradients while they and the weights that made them are still there.

        Args:
            optimizer: the one that is about to step, where there are several. The same again
                without a forward in between is one step, as where an optimizer's step calls its
                parent's.
        """
        self._exchanges.expect_gradients()
        self._inspect_gradients(optimizer)
        self._exchanges.catch_up(self.step, "gradients")

    @contained
    def _inspect_gradients(self, optimizer: Any) -> None:
        ctx = None
        if self._clock.phase is not Phase.CLOSED and not is_capturing():
            ctx = self._contexts.before_optimizer(self.step + 1, optimizer)
        if ctx is not None:
            self._clock.before_optimizer_step(ctx)
        else:
            self._exchanges.expect_nothing()

    def on_step(self, loss: Tensor | float | None = None) -> Diagnosis | None:
        """Report that an optimizer step has been made.

        Args:
            loss: the step's loss; a tensor is detached, and read only when a sampled step needs it.

        Returns:
            A :class:`~stabmon.diagnosis.Diagnosis` on sampled steps, on a step at which a NaN or
            inf first comes up, and on one which shows that the rate is too high; else None.
        """
        if self._clock.phase is Phase.CLOSED:
            self._parts.usage.used_after_close()
            return None
        self.step += 1
        # until all that is due was exchanged, nothing is called that may raise; what is due is
        # noted again if that has failed, since others wait for it
        for _ in range(2):
            try:
                self._exchanges.expect_step(self.step)
                break
            except Exception as error:
                self.boundary.failed("on_step", error)
        diagnosis = self._end_step(loss)
        self._exchanges.catch_up(self.step)
        if not self._manual:
            self.begin_step()
        return diagnosis

    @contained
    def _end_step(self, loss: Tensor | float | None) -> Diagnosis | None:
        self._recorder.open_sinks()
        ctx = self._contexts.at_end(self.step, loss)
        self._guard.run.grad_scaler = (
            self._parts.optimizers.grad_scaler
        )  # it may have been found since
        self._clock.on_step_end(ctx)
        self._exchanges.catch_up(self.step, "held")
        diagnosis = self._diagnose(ctx, self._parts.updates.measure_updates(ctx))
        self._exchanges.catch_up(self.step, "reading")
        if ctx.sampled or (diagnosis is not None and world_size() == 1):
            self._intervene(diagnosis)
        self._plan_next(ctx, diagnosis)
        self._observer.reset()
        return diagnosis

    def is_sampled(self, step: int) -> bool:
        """Return whether optimizer step ``step``, counted from 1, is sampled.

        Under the adaptive schedule this is known of the next step alone; for a later one it says
        whether it, or one before it, will be.
        """
        return self._parts.is_sampled(step)

    @contained
    def get_intervention(self, diagnosis: Diagnosis) -> Intervention | None:
        """Propose an intervention for the open alarms of a diagnosis.

        Args:
            diagnosis: the one that :meth:`on_step` returned.

        Returns:
            One that the configuration allows, or, where it names none, one that the preset
            ``guard`` allows; None where nothing is to be done, or nothing left that was not tried.
        """
        with self._clock.own_work():
            return self._guard.get_intervention(diagnosis.open_issues)

    @contained
    def apply(
        self, intervention: Intervention | None, *, hold: bool | None = None
    ) -> Applied | None:
        """Apply an intervention, after the optimizer's step.

        It stays until its ``undo()`` or ``release()``: stabmon does not judge it by later batches,
        take it back, loosen it or release it, under any configuration. Its effect is proven on the
        step's own batch, run again before and after; without that batch it is not judged, and
        ``record["note"]`` says so. Under torch.distributed, every rank must apply the same.

        Args:
            intervention: the intervention; None to do nothing.
            hold: True to hold it from step to step until it is undone or released. False to do it
                once and release it: a change of weights is made once, and a rate, temperature or
                cap is in force for one optimizer step. None for the intervention's own way, which
                for most is to hold.

        Returns:
            A record of it, whose ``undo()`` takes it back. None where it does not fit this run; the
            log and the audit record in ``interventions.jsonl`` say why.
        """
        if intervention is None:
            return None
        run, seen = self._guard.run, self._observer
        run.step, run.forwards = self.step, seen.forwards.calls or seen.last_forward
        try:
            with self._clock.own_work():
                applied = self._guard.apply(intervention, by_user=True, hold=hold)
        finally:
            run.forwards = ()
        self._note_treated([] if applied is None else [applied])
        if not self._manual and self._clock.phase is not Phase.CLOSED:
            self._start_observing()
        return applied

    def __repr__(self) -> str:
        return monitor_text(self.step, self._clock.phase, self.config.log_every, self._tracker)

    def _repr_html_(self) -> str:
        """Return the state of the run at a glance, for notebooks."""
        return monitor_html(repr(self), self._tracker, self.incidents, self.applied, self.run_dir)

    @property
    def run_dir(self) -> Path | None:
        """The folder of the records; None where they are kept in memory only.

        ``<run_dir>/stabmon``, or from the first step on ``<run_dir>/stabmon-2`` and so on where
        another monitor is writing there.
        """
        return self._recorder.folder

    @property
    def issues(self) -> list[StabilityIssue]:
        """Every issue emitted so far, in order; of more than 20,000 the newest and those open.

        All are in ``issues.jsonl``.
        """
        return self._recorder.issues

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """Newest change of each incident so far: issues by cause, in words."""
        return self._recorder.incidents

    @property
    def applied(self) -> tuple[Applied, ...]:
        """Every intervention applied so far, in order."""
        return tuple(self._guard.applied)

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
        """Modules with attention that is not seen, in words; from the first sampled step on."""
        return dict(self._observer.unseen)

    @property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """Every issue open now, as last emitted."""
        return self._tracker.open_issues

    def close(self) -> None:
        """Leave the model as it was found and close the sinks; may be called twice.

        Records stay; copies of the weights are dropped, and no part of stabmon keeps the model,
        the optimizer or this monitor alive any longer.
        """
        if self._clock.phase is Phase.CLOSED:
            return
        ranks, self._clock.phase = self._ranks, Phase.CLOSED
        parts: list[tuple[str, Callable[[], None]]] = [
            ("clock", self._clock.close),
            ("observer", self._observer.close),
            ("optimizers", self._parts.optimizers.close),
            ("records", lambda: self._recorder.close(self.step)),
        ]
        if ranks is not None:
            parts.insert(0, ("ranks", ranks.close))
        for name, close in parts:
            for _ in range(2):  # as finish() does, whose own failure must not reach training either
                try:
                    close()
                    break
                except Exception as error:
                    self.boundary.failed(f"close {name}", error)

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed monitor needs to go on: plain values.

        They are for ``torch.save``, or for JSON with NaN. The records up to here are written when
        it returns, unless a sink fails or takes longer than 2 s.
        """
        self._recorder.flush()
        share = self._guard.run.share
        own = [own for each in self._tracker.history.layers if (own := share.own(each)) is not None]
        return {
            "version": monitor_state.STATE_VERSION,
            "model": monitor_state.attention_of(self.model, own),
            "step": self.step,
            "last_reading": self._readings.last_step,
            "issues": [issue.to_dict() for issue in self.issues],
            "alarms": self._recorder.alarms,
            "tracker": self._tracker.state_dict(),
            **{key: part.state_dict() for key, part in self._parts.stored.items()},
            **({} if share.is_whole else {"share": monitor_state.share_state(share)}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        The state is read whole before anything is changed. Interventions, settings, signals and
        rules that are no longer known are left out with a warning, and the rest is taken.

        Args:
            state: the value that :meth:`state_dict` returned, in this version or an earlier one.

        Raises:
            ValueError: if ``state`` is no monitor's state, one of another model, or of a later
                version of stabmon; nothing has changed then.
        """
        tracker = make_tracker(self.config, self.boundary, is_shown=self._is_shown)
        try:
            saved = monitor_state.parse(state, self.model, tracker, self._parts.stored)
        except ValueError:
            self.resume_without_state()
            raise
        if self._exchanges.all_resume(saved.step):
            self._resume(saved, tracker)

    def resume_without_state(self) -> None:
        """Tell the other ranks of a resumed run that this one has no state; then none uses its own.

        A rank that begins to train without one says so by itself. Others wait for that word in
        :meth:`load_state_dict`.
        """
        self._exchanges.resume_without_state()

    @contained
    def _resume(self, saved: monitor_state.SavedState, tracker: IssueTracker) -> None:
        self._open()
        self.step, self._readings.last_step = saved.step, saved.last_reading
        self._tracker, self._is_resumed = tracker, True
        tracker.history.is_resumed = True
        self._recorder.restore(saved.issues, saved.alarms)
        self._guard.run.step, self._guard.run.history = saved.step, tracker.history
        if self._ranks is not None:
            self._ranks.share = saved.share
        saved.restore_parts()
        alone = not self._exchanges.together
        self._schedule.resume(tracker.history.readings, tracker.history.losses, alone=alone)
        if self._ranks is not None:
            self._ranks.agenda = self._schedule.first(self.step)
        if not self._manual:
            self.begin_step()

    # -- for integrations

    @contained
    def expect_end(self, last_step: int | None) -> None:
        """Warn if no step until the run's end is sampled.

        Args:
            last_step: the run's last optimizer step, counted from 1; None for a dry run.
        """
        self._parts.usage.expect_end(self.step, last_step)

    @contained
    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the loss that is differentiated.

        Args:
            loss: a scalar tensor; the shares of a step are added up.
        """
        self._observer.losses.add_reported(loss)

    def name_exchange(self, name: str) -> None:
        """Set the name under which ranks find each other, before the first step.

        Args:
            name: the same on all ranks, and another for each monitor.
        """
        if self._ranks is not None:
            self._ranks.name = name

    def leave_ranks(self) -> None:
        """Report this rank's readings alone; to be called before the first step.

        Without it, a rank with a monitor would wait for ranks that have none.
        """
        if self._ranks is not None:
            self._ranks.leave("")

    # -- inside a step

    def _first_forward(self) -> None:
        """Note that training begins: weights and states are loaded by now, if ever."""
        self.resume_without_state()
        self._guard.on_first_forward(self.step)

    @contained
    def _left_alone(self) -> None:
        """Go on without the other ranks, which intervene no longer either."""
        self._readings.ranks = None
        self._parts.detector.report_alone()
        self._guard.leave_ranks()

    @contained
    def _diagnose(self, ctx: StepContext, updates: UpdatesOfStep | None) -> Diagnosis | None:
        reading = self._readings.build(
            ctx,
            updates or UpdatesOfStep(),
            has_news=self._clock.has_news,
            watches_losses=self.config.watch_every_step,
        )
        if reading is None:
            return None
        factor = self._guard.run.rate_factor
        shown = self._guard.automatic or factor != 1
        return judge(
            reading,
            self._tracker,
            self._recorder,
            unseen=self._observer.unseen,
            scalars={"learning_rate_factor": factor} if shown else {},
        )

    @contained
    def _plan_next(self, ctx: StepContext, diagnosis: Diagnosis | None) -> None:
        """Let the schedule know what was found in this step and what it took."""
        alone = not self._exchanges.together
        if diagnosis is not None:
            self._schedule.heed(diagnosis.open_issues, alone=alone)
        self._schedule.end_step(ctx.step, self.boundary.seconds, sampled=ctx.sampled)
        if alone and self._schedule.adapts:
            self._schedule.watch(ctx.step, ctx.loss, self._parts.optimizers.learning_rates())

    @contained
    def _end_cooldowns(self) -> None:
        self._tracker.end_cooldowns()

    @contained
    def _rolled_back(self, step: int) -> None:
        self._tracker.end_cooldowns()
        self._tracker.history.rolled_back(step)

    @contained
    def _intervene(self, diagnosis: Diagnosis | None) -> None:
        """Let the guard judge and intervene, on all ranks alike, also without a diagnosis."""
        run, history = self._guard.run, self._tracker.history
        seen = self._observer.measurements.modules
        run.layers = {**run.layers, **{run.share.common(name): each for name, each in seen.items()}}
        run.history = history
        run.is_uncertain = (
            self.config.watch_every_step and self._parts.step_length.rates.is_uncertain
        )
        open_issues = self._tracker.open_issues
        if any(issue.is_alarm for issue in open_issues):
            run.forwards = self._observer.forwards.calls
        newest = history.latest if diagnosis is not None and len(history) else None
        healthy = (
            newest is not None and newest.non_finite is None and math.isfinite(newest.loss or 0.0)
        )
        if self._exchanges.is_troubled:
            return  # all ranks stop, at the end of the step
        with self._clock.own_work():
            self._note_treated(self._guard.intervene(open_issues, healthy=healthy))

    def _note_treated(self, applied: Sequence[Applied]) -> None:
        places = [place for each in applied for place in each.effect.places]
        self._tracker.history.treated |= {layer for layer, _ in places if layer is not None}

    # -- set-up

    def _open(self) -> None:
        """Open the sinks and prepare the guard; once, before the first step."""
        if self._clock.phase is not Phase.NEW:
            return
        self._clock.phase = Phase.TRAINING
        self._tracker.history.is_resumed = self.step > 0
        self._recorder.set_meta(
            lambda: run_meta(
                self.model,
                self.config,
                self._framework,
                self._is_resumed or self.step > 1,
                max(1, self.step),
            )
        )
        self._guard.begin(ranks_agree=self._ranks is not None)
        if self._ranks is None and world_size() > 1 and rank() == 0 and not self._guard.automatic:
            logger.warning(
                "stabmon: %d ranks train together, and only what rank 0 sees is recorded: give every "
                "rank a monitor with reduce_ranks=True",
                world_size(),
            )

    def _start_observing(self) -> None:
        ctx = self._contexts.at_begin(self.step + 1)
        self._clock.on_step_begin(ctx)
        every = self.config.watch_every_step or self._clock.wants_attention
        self._observer.start(ctx.step, sampled=ctx.sampled, watched=ctx.sampled or every)
