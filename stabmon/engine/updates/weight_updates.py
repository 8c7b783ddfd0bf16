"""Measure what the optimizers change in a sampled step: rates, groups, and W_q and W_k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stabmon._torch.optimizer_adapter import OptimizerAdapter, ParameterGroup
from stabmon.engine.updates.group_updates import GroupUpdates
from stabmon.engine.updates.qk_updates import QKUpdates
from stabmon.listeners import StepContext, StepListener
from stabmon.records import QKUpdate
from stabmon.signals.accumulator import Measurements


@dataclass(frozen=True)
class UpdatesOfStep:
    """The changes of one step."""

    query_key: dict[str, QKUpdate] = field(default_factory=dict)
    """Those of W_q and W_k, by layer."""
    groups: dict[str, float] = field(default_factory=dict)
    """The share by which each parameter group moved, by key."""


class WeightUpdates(StepListener):
    """Copies weights before the optimizers step, and compares them when a reading asks.

    The comparison comes after every listener's ``on_step_end``, so that the edits of interventions
    count as part of the step.

    Args:
        optimizers: the run's optimizers.
        scheduled: returns the rate of a group as its scheduler has set it.
        measurements: the attention layers that the present step has shown.
    """

    def __init__(
        self,
        optimizers: OptimizerAdapter,
        scheduled: Callable[[ParameterGroup], float | None],
        measurements: Measurements,
    ) -> None:
        self._optimizers, self._scheduled = optimizers, scheduled
        self._measurements = measurements
        self._query_key, self._groups = QKUpdates(), GroupUpdates()

    def before_optimizer_step(self, ctx: StepContext) -> None:
        if not ctx.sampled:
            return
        self._optimizers.note_rates(ctx.optimizer, self._scheduled)
        if ctx.is_first:
            self._groups.before(self._optimizers.groups())
        seen = self._measurements
        self._query_key.before(seen.modules, seen.info, again=not ctx.is_first)

    def measure(self) -> UpdatesOfStep:
        """Compare the weights with their copies, and drop these."""
        return UpdatesOfStep(
            self._query_key.after(scaled=self._optimizers.scales), self._groups.after()
        )
