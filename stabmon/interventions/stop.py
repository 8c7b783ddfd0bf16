"""A clean end of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.training_run import TrainingRun


@intervention
@dataclass(frozen=True)
class Stop(Intervention):
    """Ask the training loop to end after this step.

    Nothing is killed: the loop's own checkpoints and callbacks run as usual. It costs the rest of
    the run, and repairs nothing.

    Example:
        >>> import torch
        >>> run = TrainingRun(torch.nn.Linear(2, 1))
        >>> applied = Stop(why="the loss is NaN").apply(run)
        >>> run.stop_reason
        'the loss is NaN'
        >>> applied.undo(), run.stop_reason
        (True, None)
    """

    treats: ClassVar[Mapping[str, int]] = {"non_finite": 20}

    affects_whole_run: ClassVar[bool] = True
    once: ClassVar[bool] = True

    def unsuited(self, run: TrainingRun, symptom: str) -> str:
        found = run.newest_harmless_nonfinite()
        if symptom == "non_finite" and found is not None and found.skipped <= 2 * found.search:
            return "the weights are finite, and training may go on by itself"
        return ""

    def _start(self, run: TrainingRun) -> Effect:
        return _Stopping(
            run, self.why or (self.issues[0].issue_type if self.issues else "asked for")
        )


class _Stopping(Effect):
    """The request to stop, and the reason from before it."""

    def __init__(self, run: TrainingRun, reason: str) -> None:
        self.run, self._before = run, run.stop_reason
        run.stop_reason = reason
        super().__init__(before={"stop": self._before}, after={"stop": reason})

    def release(self) -> None:
        self.run.stop_reason = self._before
