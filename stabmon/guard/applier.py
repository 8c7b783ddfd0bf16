"""Put interventions in force, on all ranks or on none, and release them."""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from dataclasses import replace

from stabmon._torch.callbacks.finish import finish
from stabmon._torch.ranks.exchange import RankFailed
from stabmon.guard.audit import write_not_made
from stabmon.guard.joint_work import JointWork
from stabmon.guard.policy import Policy
from stabmon.incidents.intervention_words import ARMED
from stabmon.interventions.base import Applied, Intervention
from stabmon.interventions.effects.elsewhere import NOTE, Elsewhere
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable

logger = logging.getLogger("stabmon")


class Applier:
    """Applies interventions to one run, and remembers those that did not fit.

    Args:
        run: the run.
        policy: is told what was applied and refused.
        joint: the work with other ranks.
    """

    def __init__(self, run: TrainingRun, policy: Policy, joint: JointWork) -> None:
        self.run, self.policy, self.joint = run, policy, joint

    def apply(
        self, intervention: Intervention, *, by_user: bool = False, hold: bool | None = None
    ) -> Applied | None:
        """Apply an intervention on all ranks.

        Args:
            intervention: the intervention.
            by_user: a person asked for it, and only a person ends it.
            hold: see :meth:`~stabmon.engine.monitor.AttentionStabilityMonitor.apply`.

        Returns:
            None where it does not fit on some rank; that is logged, audited and remembered.
        """
        applied, refusal = None, NotApplicable("it does not fit on another rank")
        exchange = self.joint.exchange
        try:
            with exchange.joint("an intervention") if exchange else nullcontext():
                applied = self._start(intervention, by_user, hold)
        except NotApplicable as error:
            refusal = error.with_traceback(None)  # whose frames hold this one
        except RankFailed as error:
            if applied is not None:
                applied.undo(refusal.reason)
                applied = None
            if exchange is None or error.depth <= exchange.depth:
                raise  # more has ended than this
            refusal = NotApplicable(f"it does not fit on another rank: {error}")
        except Exception as error:
            logger.error(
                "%s failed and is not tried again here, training goes on: %s",
                intervention.name,
                error,
                exc_info=error,
            )
            refusal = NotApplicable(f"it failed: {type(error).__name__}: {error}")
            if exchange is not None:  # what it has changed here until then was not taken back
                self.joint.is_sound = False
                self.joint.why = self.joint.why or f"{intervention.name} failed: {error}"
        finally:
            self.run.by_user = False
        if applied is None:
            self._refuse(intervention, refusal, by_user)
            return None
        has_hold = "hold" in intervention.settings
        applied.by_user = by_user
        if hold is False and not has_hold and not intervention.once:
            applied.hold_for_one_step()
        self.policy.note_applied(applied)
        return applied

    def install_at_start(self) -> None:
        """Apply each intervention of the start that was not applied yet."""
        present = {each.intervention.name for each in self.run.applied}
        for each in self.policy.interventions.values():
            if each.install_at_start and each.name not in present:
                try:
                    each.aimed_at((), ARMED).apply(self.run)
                except NotApplicable as error:
                    logger.info("%s is left out: %s", each.name, error.reason)

    def release_all(self) -> None:
        """Release every intervention that is in force, the newest first."""
        for applied in reversed(self.run.applied):
            if applied.active:
                finish(applied.effect.release, functools.partial(_log_failure, applied))
                applied.active = False

    def _start(self, intervention: Intervention, by_user: bool, hold: bool | None) -> Applied:
        if hold and intervention.once:
            raise NotApplicable(
                f"{intervention.name} is done at once and cannot be held", "leave hold out"
            )
        if "hold" in intervention.settings and hold is not None:
            intervention = replace(intervention, hold=hold)  # type: ignore[call-arg]
        self.run.by_user = by_user
        if not by_user and (needless := intervention.needless(self.run)):
            raise NotApplicable(needless)
        try:
            return intervention.apply(self.run)
        except NotApplicable as error:
            layers = {issue.layer for issue in intervention.issues}
            held_here = not all(map(self.run.share.is_elsewhere, layers))
            if error.everywhere or not layers or held_here:
                raise
        # nothing was changed here, and the stage that holds the layers says whether it fits
        places = [(issue.layer, issue.head) for issue in intervention.issues]
        effect = Elsewhere(places, note=NOTE)
        return Applied(intervention, self.run, effect, step=self.run.step).write_audit("applied")

    def _refuse(self, intervention: Intervention, refusal: NotApplicable, by_user: bool) -> None:
        """Log, audit and remember an intervention that did not fit."""
        if by_user:
            logger.warning("%s is not applied: %s", intervention.name, refusal.reason)
        self.policy.note_refused(intervention, refusal)
        first = intervention.issues[0] if intervention.issues else None
        layer, head = (None, None) if first is None else (first.layer, first.head)
        more = {} if first is None else {"issue_type": first.issue_type}
        more |= {"why": refusal.reason, "note": refusal.advice}
        write_not_made(self.run, "refused", intervention.name, layer, head, **more)


def _log_failure(applied: Applied, error: Exception) -> None:
    logger.error("%s could not be released: %s", applied.intervention.name, error, exc_info=error)
