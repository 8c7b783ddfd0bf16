"""Choose, apply, judge and take back interventions at the moments of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stabmon._settings import ByName
from stabmon._storage.stored_value import Stored
from stabmon._torch.process_group import world_size
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon.guard.applier import Applier
from stabmon.guard.audit import write_not_made
from stabmon.guard.joint_rounds import JointRounds
from stabmon.guard.joint_work import JointWork
from stabmon.guard.policy import Policy
from stabmon.guard.proposals import Proposals
from stabmon.guard.symptoms import may_ruin
from stabmon.guard.trials import stored_key
from stabmon.interventions.base import INTERVENTIONS, Applied, Intervention
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.equal_weights import make_equal
from stabmon.interventions.run.learning_rates import failed_hooks
from stabmon.interventions.run.prepared import Prepared
from stabmon.interventions.run.saved_intervention import SavedIntervention
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.listeners import StepContext, StepListener
from stabmon.records import AttentionCall, StabilityIssue

logger = logging.getLogger("stabmon")


def make_interventions(
    named: Mapping[str, Mapping[str, Any] | bool | None],
) -> dict[str, Intervention]:
    """Make the interventions of a configuration.

    Args:
        named: settings by name; True or None for the defaults, False to leave one out.

    Returns:
        Interventions by name, in the same order.

    Raises:
        ValueError: naming an unknown intervention or setting, or an invalid value.

    Example:
        >>> make_interventions({"qk_clip": {"target": 50.0}, "rollback": False})
        {'qk_clip': QkClip(target=50.0, ...)}
    """
    made: dict[str, Intervention] = ByName(INTERVENTIONS).make(named, "interventions")
    return made


class Guard(StepListener):
    """Chooser, judge and record keeper of the interventions on one run.

    Nothing in here draws from the global random generators. With several ranks, all call every
    method at the same steps, and rank 0's issues decide.

    Args:
        run: the run.
        interventions: those allowed, as :func:`make_interventions` returns them.
        budget: limits of what may be done.
        automatic: True to intervene without being asked. If False, a person applies what
            :meth:`get_intervention` proposes; nothing is installed at the start, and nothing is
            taken back unasked.
    """

    def __init__(
        self,
        run: TrainingRun,
        interventions: Mapping[str, Intervention],
        budget: Budget | None = None,
        *,
        automatic: bool = True,
    ) -> None:
        self.run = run
        self.automatic = automatic
        self.policy = Policy(interventions, budget or Budget())
        self._joint = JointWork(run)
        self._proposals = Proposals(run, self.policy)
        self._applier = Applier(run, self.policy, self._joint)
        self._rounds = JointRounds(run, self.policy, self._proposals, self._applier, self._joint)
        self._stop_reason: str | None = None
        self._ended: list[Applied] | None = None
        """Everything that was applied, once the guard is closed."""
        self.checks_gradients = automatic and any(
            each.install_at_start for each in interventions.values()
        )
        """An intervention of the start looks at the gradients of each step."""
        self._prepared: dict[str, Prepared] = {}
        """State that interventions keep from before the first step on, by its stored key."""
        for each in interventions.values() if automatic else ():
            if (prepared := each.prepare(run)) is not None:
                self._prepared[each.state_key or each.name] = prepared

    def begin(self, *, ranks_agree: bool = True) -> None:
        """Install interventions of the start; before ``load_state_dict``.

        Args:
            ranks_agree: every rank has a guard that is given the same issues; without that, with
                several ranks, the guard does not intervene.
        """
        if self.automatic and not ranks_agree and world_size() > 1:
            logger.warning(
                "Interventions are off: all ranks must do the same, so give every rank a monitor "
                "with reduce_ranks=True"
            )
            self.automatic = False
            self._prepared = {}
        if not self.automatic:
            return
        self.run.prepared = list(self._prepared.values())
        for prepared in self.run.prepared:
            prepared.begin()
        self._install()

    def on_first_forward(self, step: int) -> None:
        """Note that the first training forward begins.

        Args:
            step: steps made before it, those before a resume included.
        """
        self.run.step = step
        for prepared in self._prepared.values():
            try:
                prepared.on_first_forward()
            except Exception as error:
                logger.warning("Of the state in which training begins nothing is kept: %s", error)

    @property
    def wants_attention(self) -> bool:
        """Return whether a held intervention needs the next forward's attention calls."""
        return self.run.step_hooks.wants("attention")

    def on_attention(self, call: AttentionCall) -> None:
        if self.run.share.prefix:
            call = replace(call, layer=self.run.share.common(call.layer))
        self.run.step_hooks.fire("attention", call)

    def before_optimizer_step(self, ctx: StepContext) -> None:
        hooks, exchange = self.run.step_hooks, self._joint.exchange
        if exchange is None:
            hooks.fire("before_optimizer_step")
        elif self.checks_gradients and self.automatic and not exchange.equal_gradients:
            with self._joint.together("gradients", quick=True):
                hooks.fire("before_optimizer_step", contain=False)
        else:
            try:
                hooks.fire("before_optimizer_step", contain=False)
            except Exception as error:
                self._joint.is_sound = False
                exchange.trouble = f"{type(error).__name__}: {error}"
                raise

    def on_step_end(self, ctx: StepContext) -> None:
        self.run.step = ctx.step
        self.run.accumulation, self.run.forwards = max(1, ctx.micro_batches), ()
        if self._joint.exchange is not None and failed_hooks:
            # this rank's step was another than that of the others
            self._joint.is_sound, self._joint.exchange.trouble = False, failed_hooks[0]
            failed_hooks.clear()
        if self._joint.exchange is None:
            self.run.step_hooks.fire("on_step")
        elif self._joint.exchange.holding:
            with self._joint.together("held"):
                self.run.step_hooks.fire("on_step", contain=False)

    def get_intervention(self, open_issues: Sequence[StabilityIssue]) -> Intervention | None:
        """Propose an intervention for the open alarms.

        Locations for which none is left are logged and audited once.

        Args:
            open_issues: every issue that is open now.

        Returns:
            The intervention, with the alarms that it is for; None where nothing is to be done.
        """
        return self._proposals.propose(open_issues)

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
        return self._applier.apply(intervention, by_user=by_user, hold=hold)

    def intervene(self, open_issues: Sequence[StabilityIssue], healthy: bool) -> list[Applied]:
        """Judge what was done, and apply what is next; once a sampled step, at its end.

        Args:
            open_issues: every issue that is open now.
            healthy: loss and gradients were finite in this step.

        Returns:
            The interventions applied just now.
        """
        if not self.automatic:
            self.policy.judge(open_issues, self.run, release=False)
            return []
        calm = healthy and not self.run.is_uncertain and not any(map(may_ruin, open_issues))
        if self._joint.exchange is not None:
            return self._intervene_together(self._joint.exchange, open_issues, calm)
        for failed in self.policy.judge(open_issues, self.run):
            failed.applied.undo(failed.reason)
        done: list[Applied] = []
        while (proposed := self.get_intervention(open_issues)) is not None:
            applied = self.apply(proposed)
            if applied is not None:
                done.append(applied)
                if proposed.ends_round:
                    break  # the alarms were those of a state that is left behind
        self._offer(calm and not done)
        return done

    def _offer(self, healthy: bool) -> None:
        for prepared in self._prepared.values():
            prepared.offer(healthy)

    # -- on several ranks

    def _intervene_together(
        self, exchange: RankExchange, open_issues: Sequence[StabilityIssue], calm: bool
    ) -> list[Applied]:
        found = self._rounds.intervene(exchange, open_issues, calm)
        if not exchange.is_troubled:
            self._offer(found.calm and not found.done)
            exchange.holding = found.holding
        return found.done

    def stop_together(self) -> None:
        """Release everything and intervene no more, on all ranks; after a rank has failed."""
        exchange = self.run.exchange
        if exchange is None or not exchange.is_troubled or not self.automatic:
            return
        self.automatic = False
        self._let_go()
        exchange.holding = False
        words = ""
        if exchange.together and exchange.are_replicas:
            try:
                words = make_equal(self.run, exchange, sound=self._joint.is_sound)
            except RankFailed as error:
                words = f"weights may differ between ranks: {error}"
        logger.warning(
            "stabmon: interventions are off on all ranks from here on, and those that were held are "
            "released: %s%s",
            self._joint.why or "another rank has failed",
            f"; {words}" if words else "",
        )
        write_not_made(
            self.run,
            "gave_up",
            None,
            None,
            None,
            places=[],
            why=self._joint.why or "a rank has failed",
        )

    def leave_ranks(self) -> None:
        """Intervene no more: ranks are together no longer, and must do the same."""
        if self.automatic and world_size() > 1:
            self.automatic = False
            self._let_go()

    def _let_go(self) -> None:
        """Release everything that is held, also by an intervention that failed half-way."""
        self._release()
        self.run.step_hooks.clear()
        for held in ("rates", "decays"):
            if held in vars(self.run):
                vars(self.run)[held].release_all()

    @property
    def stop_reason(self) -> str | None:
        """The reason to stop training after this step; None to go on."""
        return self._stop_reason or self.run.stop_reason

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs: plain values, for JSON with NaN."""
        return {
            "applied": [each.state_dict() for each in self.applied],
            "chooser": self.policy.state_dict(self.applied),
            "told": [list(key) for key in self._proposals.reported],
            **{key: prepared.state_dict() for key, prepared in self._prepared.items()},
        }

    def parse_state(self, state: Mapping[str, Any] | Stored) -> Callable[[], None]:
        """Read a state whole, change nothing, and return a function that restores it.

        The function does not raise, and is to be called after the run's history was loaded.
        Interventions that were held are held again, and those of the start that the state lacks are
        installed. One that can no longer be held (the model has changed, its code is gone) is left
        out and logged.

        Args:
            state: a value of :meth:`state_dict`.

        Raises:
            ValueError: if it is no guard's state, naming the place.
        """
        saved = Stored.of(state)
        found = [SavedIntervention.parse(each) for each in saved["applied"].parts()]
        known = [each for each in found if each is not None]
        restore_policy = self.policy.parse_state(
            saved["chooser"], [each is not None for each in found]
        )
        reported = {stored_key(key) for key in saved["told"].parts()}
        restore_prepared = [
            each.parse_state(saved[key])
            for key, each in self._prepared.items()
            if key in saved and saved[key].value is not None
        ]

        def restore() -> None:
            self._release()
            self._stop_reason = None
            self.run.applied.clear()
            for each in known:
                each.restore(self.run)
            restore_policy(self.run.applied)
            self._proposals.reported = reported
            for each_prepared in restore_prepared:
                each_prepared()
            self._install()

        return restore

    def load_state_dict(self, state: Mapping[str, Any] | Stored) -> None:
        """Go on from where :meth:`state_dict` was taken, see :meth:`parse_state`.

        Args:
            state: a value of :meth:`state_dict`.

        Raises:
            ValueError: if it is no guard's state; the guard is then as it was.
        """
        saved = Stored.of(state)
        self.parse_state(saved)()
        if saved.left_out and saved is not state:
            logger.warning("Left out of the resumed state: %s", "; ".join(saved.left_out))

    @property
    def applied(self) -> list[Applied]:
        """Every intervention applied so far, in order."""
        return self.run.applied if self._ended is None else self._ended

    def close(self) -> None:
        """Remove every hook and put every attribute back; may be called twice.

        Weights stay as they were trained and clipped. The run no longer leads to what was applied
        and prepared, which lead to the run: such a circle would keep the model alive.
        """
        self._release()
        self._ended = self.applied
        self.run.applied, self.run.prepared = [], []
        self.run.step_hooks.clear()
        for prepared in self._prepared.values():
            prepared.close()

    def _release(self) -> None:
        self._stop_reason = self.stop_reason
        self._applier.release_all()

    def _install(self) -> None:
        if self.automatic:  # else those that may be proposed need not be known yet
            self._applier.install_at_start()
