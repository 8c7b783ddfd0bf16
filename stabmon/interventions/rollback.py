"""A return to the newest healthy state, with new data from there on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar

from stabmon._settings import Bounds, Count
from stabmon.interventions.base import Applied, Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.interventions.run.snapshots import Snapshot
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import StabilityIssue
from stabmon.rules.base import symptom_of

BY_WEIGHTS = ("arithmetic", "overflow")
"""Causes of NaN and inf that lie in the size of finite weights, once every batch meets them.

Steps are skipped in a row then, and none will be made until the weights are others.
"""
FIRST = 3
"""Losses after a rollback whose median shows whether it repairs anything."""
FEW = 100
"""Most steps to go back in a run that was unstable from the start.

Within these a rollback is allowed although the loss keeps to its course.
"""


@intervention
@dataclass(frozen=True)
class Rollback(Intervention):
    """Restore the newest healthy state, bit for bit.

    Parameters, buffers, the optimizer's moments and the gradient scaler are restored. The data is
    not rewound: training goes on with the next batches, so that those that did the damage are
    skipped, as PaLM did, some 100 steps back. Random generators, step counters and the schedule
    belong to the data's place in the run and stay; with ``rewind_schedule`` the scheduler and the
    groups' rates are restored too.

    It costs the steps made since that state. It is refused while the loss keeps to its course,
    unless weights are corrupted, so that a run is never set to a state worse than its own. It is
    taken back where the first losses after it are no better than those before it: then batches or
    labels are at fault, not the weights. The record names the state and the reason.

    States are kept on the host, or in ``run_dir`` where they are too large for ``memory_gb``: see
    :class:`~stabmon.interventions.run.healthy_states.HealthyStates`. Undoing restores the corrupted
    state bit for bit, and gives up the training since. A parameter that was added to the run after
    the state was taken keeps its value.

    Example:
        >>> Rollback(every=10).settings
        {'every': 10, 'confirm': 2, 'memory_gb': 8.0, 'rewind_schedule': False}

    References:
        Chowdhery et al. 2022, arXiv:2204.02311 (PaLM): restarts that skip batches.
    """

    treats: ClassVar[Mapping[str, int]] = {"non_finite": 10, "loss": 10}
    after: ClassVar[tuple[str, ...]] = ("cap_learning_rate", "cap_query_key_update")

    affects_whole_run: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    ends_round: ClassVar[bool] = True
    once: ClassVar[bool] = True
    state_key: ClassVar[str] = "states"

    every: Count = 4
    """Sampled steps between two states."""
    confirm: Annotated[int, Bounds(0)] = 2
    """Healthy sampled steps after which a state counts as healthy, at least 0."""
    memory_gb: Annotated[float, Bounds(0, 1e6)] = 8.0
    """Host memory for all states, in GB; larger ones go to ``run_dir``."""
    rewind_schedule: bool = False
    """True to restore the scheduler and the groups' rates too."""

    def unsuited(self, run: TrainingRun, symptom: str) -> str:
        found = run.newest_harmless_nonfinite() if symptom == "non_finite" else None
        if found is None or (found.skipped and found.cause in BY_WEIGHTS):
            return ""
        return "the weights are finite, so that a rollback repairs nothing"

    def affordable(self, run: TrainingRun, budget: Budget, uses: int) -> bool:
        return uses < budget.max_rollbacks

    def is_due(self, issue: StabilityIssue, tried: Sequence[Applied]) -> bool:
        """Return whether a cap now holds the cause of steps that are not worth keeping.

        These are steps at a rate too high from the start, or that moved a layer too far. A cap that
        shortened the step itself has left no such step.
        """
        symptom = symptom_of(issue)
        too_fast = issue.evidence.get("fitting_rate") is not None or (
            symptom is not None and symptom.name == "step"
        )
        capped = any(
            each.intervention.name in self.after and not each.effect.after.get("shortened")
            for each in tried
        )
        again = any(each.intervention.name == self.name for each in tried)
        return too_fast and capped and not again

    def _start(self, run: TrainingRun) -> Effect:
        states = run.find_prepared(HealthyStates)
        if states is None:
            raise NotApplicable(
                "no states are kept: name rollback among the interventions from the start",
                everywhere=True,
            )
        # of a stage, or of a shard, each rank knows its own weights alone
        finite = not run.any_rank(not states.is_finite())
        snapshot = states.find(finite)
        if run.ranks > 1 and run.exchange is not None:
            kept = -1 if snapshot is None else snapshot.step
            found = run.exchange.meet("state to go back to", [kept, -kept])
            if found[0] != -found[1]:
                raise NotApplicable(
                    "ranks have kept the states of different steps", everywhere=True
                )
        if snapshot is None:
            raise NotApplicable("no healthy state has been seen yet", everywhere=True)
        begins_again = self._begins_again(run, snapshot)
        if finite and not begins_again and (why := states.explain_refusal(snapshot)):
            raise NotApplicable(why, everywhere=True)
        losses = (math.nan, math.nan) if begins_again else states.losses_now_and_at(snapshot)
        return _RolledBack(run, states, snapshot, self.rewind_schedule, losses)

    def prepare(self, run: TrainingRun) -> HealthyStates:
        return HealthyStates(run, every=self.every, confirm=self.confirm, memory_gb=self.memory_gb)

    def _begins_again(self, run: TrainingRun, snapshot: Snapshot) -> bool:
        """Return whether heads failed under a rate too high from the start.

        What they have learned since is then not worth the steps that it took.
        """
        from_start = any(
            issue.evidence.get("how") == "brisk" or "largest_query_key_update" in issue.evidence
            for issue in self.issues
        )
        layer = any(
            issue.issue_type == "update_spike" and issue.layer is not None for issue in self.issues
        )
        return layer or (from_start and run.step - snapshot.step <= FEW)


class _RolledBack(Effect):
    """A restored state, and the corrupted one from before it.

    Args:
        run: the run.
        states: those kept.
        snapshot: the one to go back to.
        schedule: restore the scheduler and the groups' rates too.
        losses: before the rollback, and when the state was taken; NaN where not known, or where the
            rollback is not judged by them.
    """

    def __init__(
        self,
        run: TrainingRun,
        states: HealthyStates,
        snapshot: Snapshot,
        schedule: bool,
        losses: tuple[float, float],
    ) -> None:
        super().__init__(
            before={"state_of_step": run.step},
            after={"state_of_step": snapshot.step},
            note=f"{states.describe(snapshot)}"
            + ("" if schedule else "; data, schedule and random generators go on"),
            resources=frozenset(["everything"]),
        )
        self.run, self._states, self._schedule = run, states, schedule
        self._from, self._to, self._losses = run.step, snapshot.step, losses
        self._corrupted: Snapshot | Path | None = states.keep(Snapshot.take(run), "before-rollback")
        snapshot.restore(run, schedule=schedule)
        self._others = [
            each.effect.rolled_back(snapshot.step) for each in run.applied if each.active
        ]
        self._note()

    def _note(self) -> None:
        """Tell those that watch the run that its course since the state is left behind."""
        self._states.note_rollback()
        for notify in self.run.on_rollback:
            notify(self._to)

    def explain_failure(self) -> str:
        """Return that the restored weights fare no better, where the first losses show it.

        Had the weights been at fault, these losses would be near those of the restored state. They
        are nearer to those before the rollback where the batches are.
        """
        before, then = self._losses
        if self._corrupted is None or not before > then:
            return ""
        since = [loss for step, loss in self.run.history.losses if step > self._from]
        if len(since) < FIRST or not all(map(math.isfinite, since)):
            return ""
        first, now = median(since[:FIRST]), median(since[-FIRST:])
        if first < (before + then) / 2 or now < before:
            return ""
        return (
            f"the weights of step {self._to} have a loss of {first:.3g} on the present batches, and "
            f"those given up for them had {before:.3g}: batches or labels are at fault, not weights"
        )

    def undo(self) -> bool:
        corrupted, self._corrupted = self._corrupted, None
        if corrupted is None:
            return False
        (Snapshot.load(corrupted) if isinstance(corrupted, Path) else corrupted).restore(
            self.run, schedule=self._schedule
        )
        if isinstance(corrupted, Path):
            corrupted.unlink(missing_ok=True)
        for restore in self._others:
            restore()
        self._note()
        return True

    def release(self) -> None:
        """Delete the corrupted state, so that the rollback can no longer be undone."""
        if isinstance(self._corrupted, Path):
            self._corrupted.unlink(missing_ok=True)
        self._corrupted = None
