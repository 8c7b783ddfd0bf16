"""Judge and intervene on all ranks alike: rank 0 decides, and all do the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stabmon._torch.process_group import rank
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon.guard.applier import Applier
from stabmon.guard.joint_work import JointWork
from stabmon.guard.policy import Policy
from stabmon.guard.proposals import Proposals
from stabmon.guard.symptoms import alarms_now, key_of
from stabmon.interventions.base import Applied
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import StabilityIssue


@dataclass
class Round:
    """Everything that one round has come to on this rank."""

    done: list[Applied] = field(default_factory=list)
    """The interventions applied in it."""
    calm: bool = True
    """Rank 0 sees a healthy step without an issue that may make training diverge."""
    holding: bool = False
    """Some rank holds interventions that are called after each step."""


class JointRounds:
    """The rounds of judging and intervening that all ranks make together.

    Args:
        run: the run.
        policy: judges, on rank 0.
        proposals: what is next, on rank 0.
        applier: applies it on this rank.
        joint: the work with the other ranks.
    """

    def __init__(
        self,
        run: TrainingRun,
        policy: Policy,
        proposals: Proposals,
        applier: Applier,
        joint: JointWork,
    ) -> None:
        self.run, self.policy, self.proposals = run, policy, proposals
        self.applier, self.joint = applier, joint

    def intervene(
        self, exchange: RankExchange, open_issues: Sequence[StabilityIssue], calm: bool
    ) -> Round:
        """Do what rank 0 decides, on all ranks or on none.

        Args:
            exchange: with the other ranks.
            open_issues: every issue that is open now; those of rank 0 count.
            calm: the step is healthy and nothing open may make training diverge.
        """
        found = Round()
        with self.joint.together("verdict", quick=True):
            own = self._decide(open_issues, calm) if rank() == 0 else None
            plan = exchange.of_first(own)
            exchange.needs_end = plan is not None
            if plan is not None:
                found.calm = plan["calm"]
                found.done = self._carry_out(exchange, plan, open_issues)
            found.holding = self._is_holding(exchange)
        return found

    def _is_holding(self, exchange: RankExchange) -> bool:
        """Return whether some rank is to be called after each step; the same on all ranks."""
        own = self.run.step_hooks.wants("on_step")
        later = (each for each in self.run.applied if not each.intervention.install_at_start)
        if not exchange.share.is_staged or not any(each.active for each in later):
            return own
        exchange.needs_end = True  # stages hold different things
        return self.run.any_rank(own)

    def _decide(self, open_issues: Sequence[StabilityIssue], calm: bool) -> dict[str, Any] | None:
        """Return what is to be done, as rank 0 sees it; None for nothing."""
        applied = self.run.applied
        undo = [
            [applied.index(trial.applied), trial.reason]
            for trial in self.policy.judge(open_issues, self.run, release=False)
        ]
        idle = [
            [applied.index(trial.applied), age]
            for trial, age in self.policy.trials.idle(
                {key_of(issue, symptom) for issue, symptom in alarms_now(open_issues, self.run)},
                self.policy.budget,
            )
        ]
        proposed = None if undo else self._propose(open_issues)
        if calm and not undo and not idle and proposed is None:
            return None
        return {"calm": calm, "undo": undo, "idle": idle, "apply": proposed}

    def _propose(self, open_issues: Sequence[StabilityIssue]) -> dict[str, Any] | None:
        found = self.proposals.propose(open_issues)
        if found is None:
            return None
        return {
            "name": found.name,
            "issues": [issue.to_dict() for issue in found.issues],
            "why": found.why,
        }

    def _carry_out(
        self, exchange: RankExchange, plan: Mapping[str, Any], open_issues: Sequence[StabilityIssue]
    ) -> list[Applied]:
        """Take back, loosen and apply what rank 0 says."""
        done: list[Applied] = []
        for at, why in plan["undo"]:
            self.run.applied[at].undo(why)
        for at, age in plan["idle"]:
            applied = self.run.applied[at]
            self.policy.trials.loosen(applied, age, self.run.any_rank(applied.effect.was_active()))
        proposed = plan["apply"]
        if proposed is None and plan["undo"]:
            proposed = exchange.of_first(self._propose(open_issues) if rank() == 0 else None)
        while proposed is not None:
            issues = [StabilityIssue.from_dict(each) for each in proposed["issues"]]
            intervention = self.policy.interventions[proposed["name"]]
            made = self.applier.apply(intervention.aimed_at(issues, proposed["why"]))
            exchange.needs_end = True
            if self.run.any_rank(not self.joint.is_sound):
                raise RankFailed(self.joint.why or "an intervention failed on another rank")
            if made is not None:
                done.append(made)
                if intervention.ends_round:
                    break
            proposed = exchange.of_first(self._propose(open_issues) if rank() == 0 else None)
        return done
