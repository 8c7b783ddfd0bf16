"""Acts on a run by itself: what a monitor calls at the marks of a step when interventions are
on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from stabmon._settings import ByName
from stabmon._storage.stored_value import Stored
from stabmon.guard.policy import Policy, stored_key
from stabmon.guard.symptoms import Key, may_ruin
from stabmon.interventions.base import INTERVENTIONS, Applied, Intervention
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.saved_intervention import SavedAct
from stabmon.interventions.run.training_run import Prepared, TrainingRun
from stabmon.listeners import StepContext, StepListener
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import AttentionCall, StabilityIssue

logger = logging.getLogger("stabmon")


def make_interventions(
    named: Mapping[str, Mapping[str, Any] | bool | None],
) -> dict[str, Intervention]:
    """The interventions of a configuration: name -> settings, or true for those it comes with, or
    false to leave it out.

    Raises:
        ValueError: naming an unknown intervention or setting, or a value that cannot be.
    """
    made: dict[str, Intervention] = ByName(INTERVENTIONS).make(named, "interventions")
    return made


class Guard(StepListener):
    """Chooses, applies, judges and takes back interventions on one run.

    Nothing in here draws from the global random generators. With several ranks, all call every
    method at the same steps, and rank 0's issues decide.

    Args:
        run: what may be touched.
        acts: what may be done, as :func:`make_interventions` gives it.
        budget: how much.
        automatic: whether it acts by itself. If not, a person applies what :meth:`get_intervention`
            proposes; nothing is put in place from the start, and nothing taken back unasked.
    """

    def __init__(
        self,
        run: TrainingRun,
        acts: Mapping[str, Intervention],
        budget: Budget | None = None,
        *,
        automatic: bool = True,
    ) -> None:
        self.run = run
        self.automatic = automatic
        self.policy = Policy(acts, budget or Budget())
        self._told: set[Key] = set()
        self._stop_reason: str | None = None
        self._prepared: dict[str, Prepared] = {}
        """State that interventions keep from before the first step on, by its stored key."""

    def allow(self, interventions: Mapping[str, Intervention], budget: Budget) -> None:
        """Propose these from now on, to a person who asks."""
        self.policy.interventions, self.policy.budget = interventions, budget

    def begin(self, *, ranks_agree: bool = True) -> None:
        """Put in place what only helps if it is there before anything is wrong; before the first
        step, and before ``load_state_dict``.
        """
        if self.automatic and not ranks_agree and self.run.ranks > 1:
            logger.warning(
                "Interventions are off: all ranks must do the same, so give every rank a monitor "
                "with reduce_ranks=True"
            )
            self.automatic = False
        if not self.automatic:
            return
        for act in self.policy.interventions.values():
            if (prepared := act.prepare(self.run)) is not None:
                self._prepared[act.state_key or act.name] = prepared
        self.run.prepared = list(self._prepared.values())
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Apply each standing act that was not applied yet."""
        if not self.automatic:
            return  # what may be proposed need not be known yet
        there = {each.intervention.name for each in self.run.applied}
        for act in self.policy.interventions.values():
            if act.install_at_start and act.name not in there:
                try:
                    act.aimed_at((), "in place from the start").apply(self.run)
                except NotApplicable as error:
                    logger.info("%s is left out: %s", act.name, error.reason)

    @property
    def wants_attention(self) -> bool:
        """Whether the next training forward's attention calls are to be captured, sampled or
        not.
        """
        return self.run.step_hooks.wants("attention")

    def on_attention(self, call: AttentionCall) -> None:
        self.run.step_hooks.fire("attention", call)

    def before_optimizer_step(self, ctx: StepContext) -> None:
        self.run.step_hooks.fire("before_optimizer_step")

    def on_step_end(self, ctx: StepContext) -> None:
        self.run.step = ctx.step
        self.run.accumulation, self.run.forwards = max(1, ctx.micro_batches), ()
        self.run.step_hooks.fire("on_step")

    def get_intervention(self, open_issues: Sequence[StabilityIssue]) -> Intervention | None:
        """What to do next about the open alarms; None for nothing. What nothing can be done about
        any more is written to the audit.
        """
        act = self.policy.propose(open_issues, self.run)
        news: dict[str, list[Key]] = {}
        for key, words in self.policy.gave_up.items():
            if key not in self._told:
                self._told.add(key)
                news.setdefault(words, []).append(key)
        for words, keys in news.items():
            layer, head = keys[0][1:] if len(keys) == 1 else (None, None)
            logger.warning("No intervention is left for %d places: %s", len(keys), words)
            record = {
                "intervention": None,
                "action": "gave_up",
                "step": self.run.step,
                "layer": layer,
                "head": head,
            }
            self.run.audit({**record, "places": [list(key[1:]) for key in keys], "why": words})
        return act

    def apply(
        self, intervention: Intervention, *, by_hand: bool = False, hold: bool | None = None
    ) -> Applied | None:
        """Apply an intervention on all ranks; None where it does not fit on one of them, which is
        then told and remembered.

        Args:
            intervention: what to do.
            by_hand: a person does it: only a person ends it.
            hold: see :meth:`~stabmon.engine.monitor.AttentionStabilityMonitor.apply`.
        """
        applied, refusal = None, NotApplicable("it does not fit on another rank")
        own = "hold" in intervention.settings
        try:
            if hold and intervention.once:
                raise NotApplicable(
                    f"{intervention.name} is done at once and cannot be held", "leave hold out"
                )
            if own and hold is not None:
                intervention = replace(intervention, hold=hold)  # type: ignore[call-arg]
            self.run.by_hand = by_hand
            applied = intervention.apply(self.run)
        except NotApplicable as error:
            refusal = error
        except Exception as error:
            logger.error(
                "%s failed and is not tried again here, training goes on: %s",
                intervention.name,
                error,
                exc_info=error,
            )
            refusal = NotApplicable(f"it failed: {type(error).__name__}: {error}")
        finally:
            self.run.by_hand = False
        if self.run.any_rank(applied is None):
            if applied is not None:
                applied.undo(refusal.reason)
            if by_hand:
                logger.warning("%s is not applied: %s", intervention.name, refusal.reason)
            self.policy.note_refused(intervention, refusal)
            record = {
                "intervention": intervention.name,
                "action": "refused",
                "step": self.run.step,
                "layer": None,
                "head": None,
            }
            first = intervention.issues[0] if intervention.issues else None
            if first is not None:
                record |= {"layer": first.layer, "head": first.head, "issue_type": first.issue_type}
            self.run.audit({**record, "why": refusal.reason, "note": refusal.advice})
            return None
        assert applied is not None
        applied.by_hand = by_hand
        if hold is False and not own and not intervention.once:
            applied.hold_for_one_step()
        self.policy.note_applied(applied)
        return applied

    def intervene(self, open_issues: Sequence[StabilityIssue], healthy: bool) -> list[Applied]:
        """Judge what was done, and do what is next; once a sampled step, after :meth:`on_step_end`.

        Args:
            open_issues: every issue that is open now.
            healthy: whether loss and gradients were finite in this step.

        Returns:
            What was applied just now.
        """
        if not self.automatic:
            self.policy.judge(open_issues, self.run, let_go=False)
            return []
        issues, healthy = self._of_first_rank(open_issues, healthy)
        for failed in self.policy.judge(issues, self.run):
            failed.applied.undo(failed.reason)
        done: list[Applied] = []
        while (act := self.get_intervention(issues)) is not None:
            applied = self.apply(act)
            if applied is not None:
                done.append(applied)
                if act.ends_round:
                    break  # what is ill was so in a state that is left behind
        if self._prepared:
            calm = not self.run.uneasy and not any(may_ruin(issue) for issue in issues)
            for prepared in self._prepared.values():
                prepared.offer(healthy and calm and not done)
        return done

    @property
    def stop_reason(self) -> str | None:
        """Why training should stop after this step; None to go on."""
        return self._stop_reason or self.run.stop_reason

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to hold what is held: plain values, for JSON with NaN."""
        return {
            "applied": [each.state_dict() for each in self.run.applied],
            "chooser": self.policy.state_dict(self.run.applied),
            "told": [list(key) for key in self._told],
            **{key: prepared.state_dict() for key, prepared in self._prepared.items()},
        }

    def parse_state(self, state: Mapping[str, Any] | Stored) -> Callable[[], None]:
        """Read a state whole and change nothing; return what takes it up, which does not raise.

        Taken up, held acts are held again, and standing acts that the state does not know are put
        in place. An act that can no longer be held (the model has changed, its code is gone) is
        left out and told of. After the run's history has been loaded.

        Raises:
            ValueError: if it is no guard's state, naming the place.
        """
        saved = Stored.of(state)
        found = [SavedAct.parse(each) for each in saved["applied"].parts()]
        acts = [each for each in found if each is not None]
        policy = self.policy.parse_state(saved["chooser"], [each is not None for each in found])
        told = {stored_key(key) for key in saved["told"].parts()}
        prepared = [
            each.parse_state(saved[key])
            for key, each in self._prepared.items()
            if key in saved and saved[key].value is not None
        ]

        def take_up() -> None:
            self.close()
            self._stop_reason = None
            self.run.applied.clear()
            for each in acts:
                each.take_up(self.run)
            policy(self.run.applied)
            self._told = told
            for restore in prepared:
                restore()
            self._put_in_place()

        return take_up

    def load_state_dict(self, state: Mapping[str, Any] | Stored) -> None:
        """Go on where :meth:`state_dict` was taken: see :meth:`parse_state`.

        Raises:
            ValueError: if it is no guard's state; the guard is then as it was.
        """
        saved = Stored.of(state)
        self.parse_state(saved)()
        if saved.left_out and saved is not state:
            logger.warning("Left out of the resumed state: %s", "; ".join(saved.left_out))

    def close(self) -> None:
        """Take every hook out and put every attribute back; weights stay as they were trained and
        clipped. May be called twice.
        """
        self._stop_reason = self.stop_reason
        for applied in reversed(self.run.applied):
            if applied.active:
                applied.active = False
                try:
                    applied.effect.release()
                except Exception as error:
                    logger.error(
                        "%s could not be let go: %s",
                        applied.intervention.name,
                        error,
                        exc_info=error,
                    )

    def _of_first_rank(
        self, issues: Sequence[StabilityIssue], healthy: bool
    ) -> tuple[Sequence[StabilityIssue], bool]:
        if self.run.ranks == 1:
            return issues, healthy
        told: list[Any] = [[issue.to_dict() for issue in issues], healthy]
        dist.broadcast_object_list(told)
        return [StabilityIssue.from_dict(issue) for issue in told[0]], bool(told[1])
