"""What stands between a monitor and its interventions: when they are told of what, and what they
may see of a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon.config import StabilityConfig, proposed_interventions
from stabmon.engine.rank_reducer import world_size
from stabmon.guard import Guard
from stabmon.interventions import Applied, Intervention, TrainingRun
from stabmon.records import AttentionCall, Diagnosis
from stabmon.rules.tracking.issue_tracker import IssueTracker

if TYPE_CHECKING:
    from stabmon.engine.step_observer import StepObserver

logger = logging.getLogger("stabmon")


class Acting:
    """The guard of a run, by itself where the configuration names interventions, else at a person's
    word.

    Args:
        model: the model that trains.
        optimizer: its optimizer, scaler included.
        lr_scheduler: what sets its rates.
        config: which interventions, and how many; the preset ``guard`` has those that are proposed
            where it names none.
        run_dir: where states that are too large for memory are kept.
        audit: receives each audit record.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerAdapter,
        lr_scheduler: Any,
        config: StabilityConfig,
        run_dir: Path | None,
        audit: Callable[[Any], None],
    ) -> None:
        run = TrainingRun(
            model,
            optimizer.optimizer,
            lr_scheduler,
            optimizer.grad_scaler,
            run_dir=run_dir,
            audit=audit,
        )
        self.guard = Guard(
            run,
            proposed_interventions(config),
            config.make_budget(),
            automatic=bool(config.interventions),
        )
        self._view = optimizer
        self._stop_reason: str | None = None

    @property
    def run(self) -> TrainingRun:
        """What may be touched."""
        return self.guard.run

    @property
    def stop_reason(self) -> str | None:
        """Why training should stop, or was stopped."""
        return self._stop_reason or self.guard.stop_reason

    def begin(self, together: bool) -> None:
        """Before the first step: put in place what has to be there before anything is wrong.
        ``together``: ranks hear of each other.
        """
        if self.guard.automatic and world_size() > 1 and not together:
            logger.warning(
                "Interventions are off: all ranks must do the same, so give every rank a monitor "
                "with reduce_ranks=True"
            )
            self.guard.automatic = False
        self.guard.begin()

    def listener(self) -> Callable[[AttentionCall], None] | None:
        """Who is told of every attention call of the forward that begins; None for nobody."""
        return self.guard.attention if self.guard.wants_attention else None

    def on_step(self, step: int, micro_batches: int, observer: StepObserver) -> None:
        """At every step, after the optimizer's: what is held may act."""
        self.run.grad_scaler = self._view.grad_scaler  # it may have been found in the meantime
        self.run.accumulation, self.run.forwards = max(1, micro_batches), ()
        with paused(observer):
            self.guard.on_step(step)

    def act(
        self, diagnosis: Diagnosis | None, tracker: IssueTracker, observer: StepObserver
    ) -> None:
        """At sampled steps: judge what was done and do what is next. On all ranks alike, also where
        this one has no diagnosis.
        """
        self.run.layers = {**self.run.layers, **observer.measurements.modules}
        self.run.history = tracker.history
        if any(issue.is_alarm for issue in tracker.open_issues):
            self.run.forwards = observer.forwards.calls
        newest = tracker.history.latest if len(tracker.history) else None
        fine = (
            newest is not None and newest.non_finite is None and math.isfinite(newest.loss or 0.0)
        )
        with paused(observer):
            self.guard.act(tracker.open_issues, healthy=fine and diagnosis is not None)

    def propose(self, diagnosis: Diagnosis, observer: StepObserver) -> Intervention | None:
        """What to do next about the alarms that are open."""
        with paused(observer):
            return self.guard.get_intervention(diagnosis.open_issues)

    def apply(
        self, intervention: Intervention, step: int, observer: StepObserver, hold: bool | None
    ) -> Applied | None:
        """Apply one at a person's word; None where it does not fit."""
        self.run.step = step
        self.run.forwards = observer.forwards.calls or observer.last_forward
        try:
            with paused(observer):
                return self.guard.apply(intervention, by_hand=True, hold=hold)
        finally:
            self.run.forwards = ()

    def close(self) -> None:
        """Take every hook out and put every attribute back."""
        self._stop_reason = self.stop_reason
        self.guard.close()


@contextmanager
def paused(observer: StepObserver) -> Iterator[None]:
    """Forwards in here are none of training's."""
    was, observer.paused = observer.paused, True
    try:
        yield
    finally:
        observer.paused = was
