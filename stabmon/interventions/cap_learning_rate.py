"""Hold the learning rate at or below what the run has been trained with before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabmon.interventions.base import CannotApply, Effect, Intervention, intervention
from stabmon.interventions.lower_learning_rate import Held
from stabmon.interventions.run import TrainingRun
from stabmon.stored import Stored


@intervention
@dataclass(frozen=True)
class CapLearningRate(Intervention):
    """While it is held, no parameter group's rate is used above ``times`` the largest that was scheduled before it jumped; where it was too
    high from the start, above ``times`` the rate that fits by what a step changed of the weights.

    What a schedule or a parameter group does by mistake is taken out, and nothing else: where the scheduled rates are lower they are used
    as they are, so that a healthy run pays nothing. Schedulers, checkpoints and loggers see the rates that they set.
    """

    times: float = 1.0
    cap: float | None = None
    """The rate to hold at, instead."""

    def __post_init__(self) -> None:
        self._check("times", 0.0, 1e6)
        if self.cap is not None:
            self._check("cap", 0.0, 1e6)

    def _start(self, run: TrainingRun) -> Effect:
        if self.cap is not None:
            return self._hold(run, self.cap)
        evidence = [issue.evidence for issue in self.issues if issue.issue_type == "update_spike"]
        before = [each.get("highest_rate_before", each.get("fitting_rate")) for each in evidence]
        highest = [float(rate) for rate in before if isinstance(rate, (int, float)) and rate > 0]
        if not highest:
            raise CannotApply("it is not known which rate was too high: give an issue of type update_spike, or a cap")
        return self._hold(run, self.times * min(highest))

    def check_saved(self, effect: Stored) -> None:
        effect["cap"].number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return self._hold(run, float(state["cap"]))

    def _hold(self, run: TrainingRun, cap: float) -> Effect:
        def scheduled() -> list[float]:
            return [rate for group in run.groups if (rate := run.scheduled_rate(group)) is not None]

        def factor() -> float:
            highest = max(scheduled(), default=0.0)
            return min(1.0, cap / highest) if highest > 0 else 1.0

        rates = scheduled()
        return Held(
            undo_=run.rates.hold(factor),
            works=lambda: factor() < 1,
            before={"lr": rates},
            after={"lr": [rate * factor() for rate in rates]},
            saved={"cap": cap},
        )
