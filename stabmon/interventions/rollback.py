"""Go back to the last healthy state, and on with new data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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

FEW = 100
"""Steps that a run which was broken from the start may be put back by though its loss keeps to its
course.
"""


@intervention
@dataclass(frozen=True)
class Rollback(Intervention):
    """Restore parameters, buffers, the optimizer's moments and the gradient scaler of the newest
    healthy state, bit for bit.

    The data is not rewound: training goes on with batches that come next, so that those which did
        the harm are passed by, as PaLM did
    (arXiv:2204.02311, some 100 steps back). Nor are random generators, step counters and the
    schedule, which belong to the data's place in the run; ``rewind_schedule`` sets back the
    scheduler and the groups' rates too.

    It goes to no state that is worse than where the run stands: not while the loss keeps to its
    course, unless weights are spoilt; the record says what it goes back to and why.

    States are kept on the host, or in ``run_dir`` where they are too large for ``memory_gb``: see
    :class:`~stabmon.interventions.run.healthy_states.HealthyStates`. Undoing it brings the spoilt
    state back bit for bit, and with it the loss of what was trained since. A parameter that was
    added to the run since the state was taken keeps its value.
    """

    treats: ClassVar[Mapping[str, int]] = {"non_finite": 10, "loss": 10}
    after: ClassVar[tuple[str, ...]] = ("cap_learning_rate", "cap_query_key_update")

    affects_whole_run: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    ends_round: ClassVar[bool] = True
    once: ClassVar[bool] = True
    state_key: ClassVar[str] = "states"

    every: Count = 4
    """Samples between the states that are kept."""
    confirm: Annotated[int, Bounds(0)] = 2
    """Healthy samples after which a state counts as healthy."""
    memory_gb: Annotated[float, Bounds(0, 1e6)] = 8.0
    rewind_schedule: bool = False

    def unsuited(self, run: TrainingRun, symptom: str) -> str:
        if symptom == "non_finite" and run.newest_harmless_nonfinite() is not None:
            return "the weights are finite, so that going back mends nothing"
        return ""

    def affordable(self, run: TrainingRun, budget: Budget, uses: int) -> bool:
        return uses < budget.max_rollbacks

    def is_due(self, issue: StabilityIssue, tried: Sequence[Applied]) -> bool:
        """The rate was too high from the start, or a layer was moved too far, and a cap holds that
        now: what was trained so is not worth keeping. A cap that shortened the step has left none.
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
                "no states are kept: name rollback among the interventions from the start"
            )
        snapshot = states.newest
        if snapshot is None:
            raise NotApplicable("no healthy state has been seen yet")
        if not self._begins_again(run, snapshot) and (why := states.why_not(snapshot)):
            raise NotApplicable(why)
        return _RolledBack(run, states, snapshot, self.rewind_schedule)

    def prepare(self, run: TrainingRun) -> HealthyStates:
        states = HealthyStates(
            run, every=self.every, confirm=self.confirm, memory_gb=self.memory_gb
        )
        states.begin()
        return states

    def _begins_again(self, run: TrainingRun, snapshot: Snapshot) -> bool:
        """Whether the rate was too high from the start and heads broke: what they learned since is
        not worth the steps it took.
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
    def __init__(
        self, run: TrainingRun, states: HealthyStates, snapshot: Snapshot, schedule: bool
    ) -> None:
        super().__init__(
            before={"state_of_step": run.step},
            after={"state_of_step": snapshot.step},
            note=f"{states.describe(snapshot)}"
            + ("" if schedule else "; data, schedule and random generators go on"),
            resources=frozenset(["everything"]),
        )
        self.run, self._schedule = run, schedule
        self._spoilt: Snapshot | Path | None = states.keep(Snapshot.take(run), "before-rollback")
        snapshot.restore(run, schedule=schedule)
        self._others = [
            each.effect.rolled_back(snapshot.step) for each in run.applied if each.active
        ]
        states.gone_back()
        for tell in run.on_rollback:
            tell(snapshot.step)

    def undo(self) -> bool:
        spoilt, self._spoilt = self._spoilt, None
        if spoilt is None:
            return False
        (Snapshot.load(spoilt) if isinstance(spoilt, Path) else spoilt).restore(
            self.run, schedule=self._schedule
        )
        if isinstance(spoilt, Path):
            spoilt.unlink(missing_ok=True)
        for take_back in self._others:
            take_back()
        return True

    def release(self) -> None:
        """Let go of the spoilt state: from here on there is no way back to it."""
        if isinstance(self._spoilt, Path):
            self._spoilt.unlink(missing_ok=True)
        self._spoilt = None
