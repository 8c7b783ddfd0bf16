"""A second warm-up of the learning rate."""

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
    r"""Multiply the learning rate by a ramp up to 1.

    The step that follows t others since the start uses the factor
    :math:`\min(1, a + (1 - a)\, t / T)`, with a for ``start`` and T for ``steps``.

    A longer warm-up delayed the growth of scores in every published run. Neither its repair of
    scores that have grown already nor its cost was measured; it is chosen only where the
    configuration names it.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> applied = ExtendWarmup(steps=10, start=0.5).apply(run)
        >>> run.rate_factor
        0.5
        >>> applied.undo(), run.rate_factor
        (True, 1)

    References:
        Wortsman et al. 2023, arXiv:2309.14322.
    """

    treats: ClassVar[Mapping[str, int]] = dict.fromkeys(ATTENTION_AND_LOSS, 100)
    # it prevents and does not repair: last of all, and only where the configuration names it

    cost: ClassVar[float] = float("inf")
    affects_whole_run: ClassVar[bool] = True

    steps: Count = 100
    """Length of the ramp, in optimizer steps."""
    start: Fraction = 0.1
    """Factor of the first step, in [0, 1]."""

    def factor(self, since: int) -> float:
        """Return the factor of the next step.

        Args:
            since: optimizer steps made since this was applied.

        Returns:
            The factor, in [``start``, 1].

        Example:
            >>> ramp = ExtendWarmup(steps=10, start=0.5)
            >>> ramp.factor(0), ramp.factor(5), ramp.factor(20)
            (0.5, 0.75, 1.0)
        """
        return min(1.0, self.start + (1 - self.start) * since / self.steps)

    def _start(self, run: TrainingRun) -> Effect:
        return _Ramp(self, run, first=run.step)

    def check_saved(self, effect: Stored) -> None:
        effect["first"].integer()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Ramp(self, run, first=int(state["first"]))


class _Ramp(Effect):
    """A factor on every rate that grows from step to step."""

    def __init__(self, warmup: ExtendWarmup, run: TrainingRun, first: int) -> None:
        before = run.rates.factor
        super().__init__(
            before={"factor": before}, after={"factor": before * warmup.factor(run.step - first)}
        )
        self.first = first
        self._release = run.rates.hold(lambda: warmup.factor(run.step - first), ramp=True)

    def release(self) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}
