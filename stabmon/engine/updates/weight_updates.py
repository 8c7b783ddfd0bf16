"""Measure the changes of groups and of W_q and W_k in a sampled step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stabmon._torch.optimizer_adapter import OptimizerAdapter, ParameterGroup
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.updates.group_updates import GroupUpdates
from stabmon.engine.updates.part_changes import PartChanges
from stabmon.engine.updates.qk_updates import QKUpdates
from stabmon.listeners import StepContext, StepListener
from stabmon.records import PartChange, QKUpdate
from stabmon.signals.accumulator import Measurements


@dataclass(frozen=True)
class UpdatesOfStep:
    """The changes of one step."""

    query_key: dict[str, QKUpdate] = field(default_factory=dict)
    """Norms of the changes of W_q and W_k, by layer."""
    partial: frozenset[str] = frozenset()
    """Layers of ``query_key`` whose norms are of this rank's shards."""
    groups: dict[str, float] = field(default_factory=dict)
    """Relative change of each parameter group, by key."""
    parts: dict[str, PartChange] = field(default_factory=dict)
    """Weights of each part of the model, by name."""
    query_key_groups: tuple[str, ...] = ()
    """Keys of the parameter groups that W_q and W_k are in."""


class WeightUpdates(StepListener):
    """Copies of weights from before the optimizers step, compared afterwards.

    The comparison comes after every listener's ``on_step_end``, so that a step that an intervention
    shortens counts as the shorter one; but before weights are edited otherwise, as by a clip that
    is held: an edit is no step of the optimizer.

    Args:
        optimizers: the run's optimizers.
        scheduled: returns the rate of a group as its scheduler has set it.
        measurements: the attention layers seen in the present step.
        boundary: counts what fails.
        parts: weights of the model's parts.
    """

    def __init__(
        self,
        optimizers: OptimizerAdapter,
        scheduled: Callable[[ParameterGroup], float | None],
        measurements: Measurements,
        boundary: ErrorBoundary,
        parts: PartChanges,
    ) -> None:
        self.boundary = boundary
        self.parts, self._begun = parts, 0
        self.newest: dict[str, float] = {}
        """Relative change of each group in the newest sampled step."""
        self._optimizers, self._scheduled = optimizers, scheduled
        self._measurements = measurements
        self._query_key, self._groups = QKUpdates(), GroupUpdates()
        self._measured: UpdatesOfStep | None = None
        """The changes of the present step, once they are measured."""
        self._is_pending = False

    def on_step_begin(self, ctx: StepContext) -> None:
        if self.parts.owes_end or ctx.step == self._begun:  # anew where a person has intervened
            self.parts.note_end()
        self._begun = ctx.step

    def before_optimizer_step(self, ctx: StepContext) -> None:
        if not ctx.sampled:
            return
        self._optimizers.note_rates(ctx.optimizer, self._scheduled)
        self._measured, self._is_pending = None, True
        seen = self._measurements
        if ctx.is_first:
            self.parts.before(seen.modules)
            self._groups.before(self._optimizers.groups(), self.parts.name_of)
        self._query_key.before(seen.modules, seen.info, again=not ctx.is_first)

    @contained
    def measure_updates(self, ctx: StepContext) -> UpdatesOfStep | None:
        """Compare the weights of a sampled step with their copies, and drop the copies."""
        self.measure_now()
        self.parts.owes_end = ctx.sampled
        measured, self._measured = self._measured, None
        return (measured or UpdatesOfStep()) if ctx.sampled else None

    @contained
    def measure_now(self) -> None:
        """Compare the weights now, of a sampled step that is not measured yet."""
        if self._is_pending:
            self._is_pending = False
            query_key = self._query_key.after(scaled=self._optimizers.scales)
            self.newest = groups = self._groups.after()
            parts = self.parts.after(self._groups.parts)
            self._measured = UpdatesOfStep(
                query_key,
                frozenset(self._query_key.partial & query_key.keys()),
                groups,
                parts,
                self._groups_of_query_key(),
            )

    def _groups_of_query_key(self) -> tuple[str, ...]:
        own = {id(each) for each in self._query_key.trained()}
        return tuple(
            group.key
            for group in self._optimizers.groups()
            if any(id(each) in own for each in group.parameters)
        )
