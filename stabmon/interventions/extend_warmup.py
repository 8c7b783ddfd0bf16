"""Warm the learning rate up once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stabmon._settings import Count, Fraction
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import ATTENTION_AND_LOSS, Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.training_run import TrainingRun


@intervention
@dataclass(frozen=True)
class ExtendWarmup(Intervention):
    """Multiply the scheduled learning rate by a ramp from ``start`` to 1 over the next ``steps``
    optimizer steps, then let go.

    A longer warm-up delays the growth of scores in every published run (Wortsman et al. 2023,
    arXiv:2309.14322); how well it repairs one that has grown already was not measured.
    """

    treats: ClassVar[Mapping[str, int]] = dict.fromkeys(ATTENTION_AND_LOSS, 100)
    # it prevents and does not repair: last of all, and only where the configuration names it

    cost: ClassVar[float] = float("inf")
    affects_whole_run: ClassVar[bool] = True

    steps: Count = 100
    start: Fraction = 0.1
    """Factor of the first step, in [0, 1]."""

    def factor(self, since: int) -> float:
        """The factor of the next step when ``since`` steps have been made since this was
        applied.
        """
        return min(1.0, self.start + (1 - self.start) * since / self.steps)

    def _start(self, run: TrainingRun) -> Effect:
        return _Ramp(self, run, first=run.step)

    def check_saved(self, effect: Stored) -> None:
        effect["first"].integer()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Ramp(self, run, first=int(state["first"]))


class _Ramp(Effect):
    def __init__(self, act: ExtendWarmup, run: TrainingRun, first: int) -> None:
        before = run.rates.factor
        super().__init__(
            before={"factor": before}, after={"factor": before * act.factor(run.step - first)}
        )
        self.first = first
        self._release = run.rates.hold(lambda: act.factor(run.step - first), ramp=True)

    def release(self) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}
