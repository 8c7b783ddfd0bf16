"""The engine: when to sample, whom to ask, and where the answers go. Knows no signal, rule or sink by name.

One optimizer step, with what a monitor does at each mark::

    begin_step()             <- wait for forwards
      forward (micro-batch)  <- if sampled: capture attention calls, reduce each to one number a head
      backward               <- if sampled: gradient norms, before they are clipped
      …                         more micro-batches
    before_optimizer_step()  <- replay the forwards, if something is not finite
      optimizer.step()
    on_step(loss)            <- if sampled: one reading -> rules -> issues -> sinks -> Diagnosis
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.config import StabilityConfig, load_config
from stabmon.distributed import RankReducer, rank
from stabmon.guard import Guard, safely
from stabmon.measurements import to_host
from stabmon.non_finite import NonFiniteWatch
from stabmon.observer import StepObserver
from stabmon.records import Diagnosis, Reading, StabilityIssue
from stabmon.rules.history import History
from stabmon.rules.tracker import IssueTracker
from stabmon.run_meta import run_meta
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars


class AttentionStabilityMonitor:
    """Watches the attention of a model in training, and changes nothing about it.

    Call :meth:`on_step` once after each optimizer step and :meth:`close` (or leave the context) at the end. Nothing here raises into
    the training loop but bad arguments to the constructor.

    Args:
        model: the model as it is called in training: plain, compiled, wrapped by DDP or FSDP.
        optimizer: just before its step is when failing batches are replayed; without one none is.
        lr_scheduler: accepted for symmetry with the callbacks; its rates are read from the optimizer.
        config: a preset's name, a YAML file's path, or a :class:`~stabmon.config.StabilityConfig`.
        log_every: sample every N-th optimizer step; the first is step 1, so N = 50 samples 50, 100, …
        sinks: names or :class:`~stabmon.sinks.Sink` objects, instead of the configuration's.
        run_dir: records go to ``<run_dir>/stabmon``; None keeps them in memory only.
        reduce_ranks: under torch.distributed, reduce sampled steps over all ranks. Every rank must then have a monitor.
        is_writer: whether this process writes to the sinks; None for rank 0 only.
        manual_steps: :meth:`begin_step` and :meth:`before_optimizer_step` are called from outside, as the integrations do.
        grad_scaler: the gradient scaler in use, whose overflows are not reported and whose scale is taken out of gradient norms;
            None for ``optimizer.scaler`` if there is one.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for a configuration, name or value that cannot be, naming it and the mend.
        TypeError: if ``model`` is no ``nn.Module``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
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
            raise TypeError(f"model is a {type(model).__name__}: give the torch.nn.Module that is trained")
        self.config = load_config(config, log_every=log_every, sinks=sinks, **overrides)
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.step = 0
        """Optimizer steps seen, those before a resume included."""
        self.issues: list[StabilityIssue] = []
        """Every issue emitted so far, in order."""
        self.run_dir = None if run_dir is None else Path(run_dir) / "stabmon"
        self.guard = Guard()
        self._writes = rank() == 0 if is_writer is None else is_writer
        self._sinks = SinkGroup(self.config.make_sinks() if self._writes else [])
        self._tracker = self._make_tracker()
        self._ranks = RankReducer(model) if reduce_ranks else None
        self._observer = StepObserver(model, self.config, self.guard, self._scale)
        self._misfortune = NonFiniteWatch(model, self.guard.failed, self._ranks.share if self._ranks else None)
        self._grad_scaler = grad_scaler if grad_scaler is not None else getattr(optimizer, "scaler", None)
        self._manual = manual_steps
        self._optimizer_hook: Any = None
        self._alarms = self._last_reading = 0
        self._opened = self._closed = self._looked = self._is_news = False
        if not manual_steps:
            self.begin_step()

    # -- the marks of a step ------------------------------------------------------------------------------------------

    @safely
    def begin_step(self) -> None:
        """Get ready for the next optimizer step. Only integrations call this: ``on_step`` does it in a loop of one's own."""
        self._looked = self._is_news = False
        if self._closed:
            return
        if not self._opened:
            self._open_sinks()
        if not self._manual and self._optimizer_hook is None:
            self._hook_optimizer()
        sampled = self.is_sampled(self.step + 1)
        self._observer.start(self.step + 1, sampled=sampled, watched=sampled or self.config.watch_every_step)

    @safely
    def before_optimizer_step(self) -> None:
        """Look at gradients while they and the parameters that made them are still there."""
        if self._closed or self._looked:
            return
        self._looked = True
        seen, sampled = self._observer, self.is_sampled(self.step + 1)
        if sampled and not seen.gradients:
            seen.measure_gradients()
        if self.config.watch_every_step:
            norm = seen.gradients.get("") if sampled else None
            scaled = self._scales() or getattr(self._inner_optimizer(), "found_inf", None) is not None
            seen.paused = True
            try:
                calls, losses = seen.forwards.calls, seen.losses.parts
                self._is_news |= self._misfortune.look(self.step + 1, calls, losses, gradients=not scaled, norm=norm)
            finally:
                seen.paused = False

    def on_step(self, loss: Tensor | float | None = None) -> Diagnosis | None:
        """Take note that an optimizer step has been made.

        Args:
            loss: the step's loss; a tensor is detached, and read only when a sampled step needs it.

        Returns:
            A :class:`~stabmon.records.Diagnosis` on sampled steps, and on a step at which a NaN or inf first comes up; else None.
        """
        if self._closed:
            return None
        self.step += 1
        self._observer.stop_capture()
        micro_batches = len(self._observer.losses.parts) or self._observer.forwards.count
        self._end_loss(loss)
        diagnosis = self._finish_step(micro_batches)
        self._observer.forget()
        if not self._manual:
            self.begin_step()
        return diagnosis

    def is_sampled(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 1, is sampled."""
        return step % self.config.log_every == 0

    def get_intervention(self, diagnosis: Diagnosis) -> None:
        """What to do about a diagnosis: None, since an observing monitor changes nothing; see each issue's suggestion."""
        return None

    @property
    def errors(self) -> Counter[str]:
        """What failed inside, by place; each is logged the first time."""
        return self.guard.errors

    @property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """Every issue open now, as last emitted."""
        return self._tracker.open_issues

    def close(self) -> None:
        """Leave the model as it was found and close the sinks; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._observer.let_go()
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None
        self._sinks.close()

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed monitor needs to go on where this one is: plain values, for JSON with NaN or ``torch.save``."""
        return {
            "step": self.step,
            "last_reading": self._last_reading,
            "issues": [issue.to_dict() for issue in self.issues],
            "tracker": self._tracker.state_dict(),
            "losses": self._observer.losses.state_dict(),
            "non_finite": self._misfortune.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: if ``state`` is no monitor's state.
        """
        tracker = self._make_tracker()
        try:
            issues = [StabilityIssue.from_dict(issue) for issue in state["issues"]]
            tracker.load_state_dict(state["tracker"])
            step, last_reading = int(state["step"]), int(state["last_reading"])
            self._observer.losses.load_state_dict(state["losses"])
            self._misfortune.load_state_dict(state["non_finite"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no monitor's state ({type(error).__name__}: {error}): give what state_dict() returned") from error
        self.step, self._last_reading, self.issues, self._tracker = step, last_reading, issues, tracker
        self._alarms = sum(issue.is_alarm for issue in issues)
        if not self._manual:
            self.begin_step()

    # -- for integrations ---------------------------------------------------------------------------------------------

    @safely
    def add_loss(self, loss: Tensor) -> None:
        """Tell the (part of the) step's loss that a micro-batch is differentiated by; parts are added up."""
        self._observer.losses.tell(loss)

    def leave_ranks(self) -> None:
        """Report this rank's readings alone, since not every rank has a monitor. To be called before the first step."""
        self._ranks, self._misfortune = None, NonFiniteWatch(self.model, self.guard.failed)

    # -- inside a step ------------------------------------------------------------------------------------------------

    @safely
    def _end_loss(self, loss: Tensor | float | None) -> None:
        value = self._observer.losses.end_step(self.step, loss, shares=self._observer.forwards.shares)
        if isinstance(value, float) and not math.isfinite(value) and not self._looked:
            self._is_news |= self._misfortune.note_loss(self.step, value)

    @safely
    def _finish_step(self, micro_batches: int) -> Diagnosis | None:
        seen, sampled = self._observer, self.is_sampled(self.step)
        sums = seen.measurements.sums
        if sampled and self._ranks is not None:  # before all that may fail, since other ranks wait for it
            sums = self._ranks.reduce(sums)
        if not seen.forwards.count:
            seen.look_for_compiled()
        if not sampled and not self._is_news:
            return None
        layers = to_host(sums) if sampled else {}
        if sampled and not layers and (why := seen.why_nothing()):
            self.guard.failed("sampling", RuntimeError(f"step {self.step}: {why}"), traceback=False)
        losses = seen.losses.take()
        reading = Reading(
            step=self.step,
            loss=losses[-1][1] if losses and losses[-1][0] == self.step else None,
            layers=layers,
            info=dict(seen.measurements.info),
            learning_rate=self._learning_rate(),
            gradients=seen.gradients,
            losses=losses,
            micro_batches=max(1, micro_batches),
            non_finite=self._misfortune.found_since(self._last_reading),
            overhead_fraction=self.guard.overhead_fraction(),
        )
        self._last_reading = self.step
        return self._judge(reading, sampled)

    def _judge(self, reading: Reading, sampled: bool) -> Diagnosis:
        issues = self._tracker.update(reading)
        self.issues += issues
        self._alarms += sum(issue.is_alarm for issue in issues)
        open_issues = self._tracker.open_issues
        if sampled:
            self._sinks.write_reading(reading, dashboard_scalars(reading, open_issues, alarms=self._alarms))
        for issue in issues:
            self._sinks.write_issue(issue)
        self._count_failed_sinks()
        return Diagnosis(reading.step, tuple(issues), reading.layers, tuple(self._tracker.history.readings), open_issues)

    # -- set-up and small things --------------------------------------------------------------------------------------

    def _make_tracker(self) -> IssueTracker:
        return IssueTracker(
            self.config.make_rules(),
            history=History(self.config.history),
            clear_after=self.config.clear_after,
            cooldown_steps=self.config.cooldown * self.config.log_every,
            on_error=functools.partial(self.guard.failed, "rule"),
        )

    def _open_sinks(self) -> None:
        self._opened = True
        run_dir = self._make_run_dir() if self._writes else None
        self._sinks.open(run_dir, run_meta(self.model, self.config))
        self._count_failed_sinks()

    @safely
    def _make_run_dir(self) -> Path | None:
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        return self.run_dir

    def _count_failed_sinks(self) -> None:
        if self._sinks.failed:
            self.errors["sink"] = len(self._sinks.failed)

    @safely
    def _hook_optimizer(self) -> None:
        register = getattr(self._inner_optimizer(), "register_step_pre_hook", None)
        if register is not None:
            self._optimizer_hook = register(lambda *_: self.before_optimizer_step())

    def _inner_optimizer(self) -> Any:
        """The optimizer inside accelerate's wrapper."""
        optimizer: Any = self.optimizer
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        return optimizer

    def _scales(self) -> bool:
        scaler = self._grad_scaler
        return scaler is not None and bool(scaler.is_enabled())

    def _scale(self) -> float | None:
        """What the gradient scaler in use multiplies gradients by; None without one. Waits for the device."""
        scaler: Any = self._grad_scaler
        return float(scaler.get_scale()) if self._scales() else None

    def _learning_rate(self) -> float | None:
        groups = getattr(self.optimizer, "param_groups", None)
        return max(float(group["lr"]) for group in groups) if groups else None
