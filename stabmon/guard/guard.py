"""Choose, apply, judge and take back interventions at the moments of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from stabmon._settings import ByName
from stabmon._storage.stored_value import Stored
from stabmon._torch.process_group import rank, world_size
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon.guard.policy import Policy
from stabmon.guard.symptoms import Key, alarms_now, key_of, may_ruin
from stabmon.guard.trials import stored_key
from stabmon.incidents.intervention_words import ARMED
from stabmon.interventions.base import INTERVENTIONS, Applied, Intervention
from stabmon.interventions.effects.elsewhere import NOTE, Elsewhere
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.equal_weights import make_equal
from stabmon.interventions.run.learning_rates import failed_hooks
from stabmon.interventions.run.saved_intervention import SavedIntervention
from stabmon.interventions.run.training_run import Prepared, TrainingRun
from stabmon.listeners import StepContext, StepListener
from stabmon.projections.not_applicable import NotApplicable
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
        self._reported: set[Key] = set()
        """Locations that were reported as untreatable."""
        self._stop_reason: str | None = None
        self._is_sound, self._why = True, ""
        """Nothing failed here in the newest work with other ranks; the reason why it failed."""
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
        hooks, exchange = self.run.step_hooks, self._exchange
        if exchange is None:
            hooks.fire("before_optimizer_step")
        elif self.checks_gradients and self.automatic and not exchange.equal_gradients:
            with self._together("gradients", quick=True):
                hooks.fire("before_optimizer_step", contain=False)
        else:
            try:
                hooks.fire("before_optimizer_step", contain=False)
            except Exception as error:
                self._is_sound = False
                exchange.trouble = f"{type(error).__name__}: {error}"
                raise

    def on_step_end(self, ctx: StepContext) -> None:
        self.run.step = ctx.step
        self.run.accumulation, self.run.forwards = max(1, ctx.micro_batches), ()
        if self._exchange is not None and failed_hooks:
            # this rank's step was another than that of the others
            self._is_sound, self._exchange.trouble = False, failed_hooks[0]
            failed_hooks.clear()
        if self._exchange is None:
            self.run.step_hooks.fire("on_step")
        elif self._exchange.holding:
            with self._together("held"):
                self.run.step_hooks.fire("on_step", contain=False)

    def get_intervention(self, open_issues: Sequence[StabilityIssue]) -> Intervention | None:
        """Propose an intervention for the open alarms.

        Locations for which none is left are logged and audited once.

        Args:
            open_issues: every issue that is open now.

        Returns:
            The intervention, with the alarms that it is for; None where nothing is to be done.
        """
        proposed = self.policy.propose(open_issues, self.run)
        news: dict[str, list[Key]] = {}
        for key, words in self.policy.untreatable.items():
            if key not in self._reported:
                self._reported.add(key)
                news.setdefault(words, []).append(key)
        for words, keys in news.items():
            layer, head = keys[0][1:] if len(keys) == 1 else (None, None)
            logger.warning("No intervention is left for %d places: %s", len(keys), words)
            places = [list(key[1:]) for key in keys]
            self._audit("gave_up", None, layer, head, places=places, why=words)
        return proposed

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
        exchange = self._exchange
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
                self._is_sound = False
                self._why = self._why or f"{intervention.name} failed: {error}"
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
        except NotApplicable:
            layers = {issue.layer for issue in intervention.issues}
            if not layers or not all(map(self.run.share.is_elsewhere, layers)):
                raise
        # nothing was changed here, and the stage that holds the layers says whether it fits
        places = [(issue.layer, issue.head) for issue in intervention.issues]
        effect = Elsewhere(places, note=NOTE)
        return Applied(intervention, self.run, effect, step=self.run.step).write_audit("applied")

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
        if self._exchange is not None:
            return self._intervene_together(self._exchange, open_issues, calm)
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

    @property
    def _exchange(self) -> RankExchange | None:
        """The exchange with other ranks, where this one intervenes with them."""
        exchange = self.run.exchange
        return exchange if exchange is not None and exchange.together else None

    @contextmanager
    def _together(self, moment: str, *, quick: bool = False) -> Iterator[None]:
        """Work with the other ranks; where it fails on one, all stop intervening."""
        exchange = self.run.exchange
        assert exchange is not None
        try:
            with exchange.joint(moment, quick=quick):
                if moment in exchange.due:
                    exchange.due.remove(moment)
                yield
        except RankFailed as error:
            exchange.is_troubled = True
            self._why = str(error)
        except Exception as error:
            self._is_sound, exchange.is_troubled = False, True
            self._why = f"{type(error).__name__}: {error}"
            logger.error("Interventions failed on rank %d: %s", rank(), error, exc_info=error)
            if moment in exchange.due:  # others wait for this rank
                exchange.due.remove(moment)
                exchange.say_failed(moment)

    def _intervene_together(
        self, exchange: RankExchange, open_issues: Sequence[StabilityIssue], calm: bool
    ) -> list[Applied]:
        """Do what rank 0 decides, on all ranks or on none."""
        done: list[Applied] = []
        plan: Any = None
        holding = False
        with self._together("verdict", quick=True):
            own = self._decide(open_issues, calm) if rank() == 0 else None
            plan = exchange.of_first(own)
            exchange.needs_end = plan is not None
            if plan is not None:
                done = self._carry_out(exchange, plan, open_issues)
            holding = self._is_holding(exchange)
        if not exchange.is_troubled:
            self._offer(plan is None or (plan["calm"] and not done))
            exchange.holding = holding
        return done

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
        found = self.get_intervention(open_issues)
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
            made = self.apply(intervention.aimed_at(issues, proposed["why"]))
            exchange.needs_end = True
            if self.run.any_rank(not self._is_sound):
                raise RankFailed(self._why or "an intervention failed on another rank")
            if made is not None:
                done.append(made)
                if intervention.ends_round:
                    break
            proposed = exchange.of_first(self._propose(open_issues) if rank() == 0 else None)
        return done

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
                words = make_equal(self.run, exchange, sound=self._is_sound)
            except RankFailed as error:
                words = f"weights may differ between ranks: {error}"
        logger.warning(
            "stabmon: interventions are off on all ranks from here on, and those that were held are "
            "released: %s%s",
            self._why or "another rank has failed",
            f"; {words}" if words else "",
        )
        self._audit("gave_up", None, None, None, places=[], why=self._why or "a rank has failed")

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
            "told": [list(key) for key in self._reported],
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
            self._reported = reported
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
        for applied in reversed(self.run.applied):
            if applied.active:
                applied.active = False
                try:
                    applied.effect.release()
                except Exception as error:
                    logger.error(
                        "%s could not be released: %s",
                        applied.intervention.name,
                        error,
                        exc_info=error,
                    )

    def _install(self) -> None:
        """Apply each intervention of the start that was not applied yet."""
        if not self.automatic:
            return  # those that may be proposed need not be known yet
        present = {each.intervention.name for each in self.run.applied}
        for each in self.policy.interventions.values():
            if each.install_at_start and each.name not in present:
                try:
                    each.aimed_at((), ARMED).apply(self.run)
                except NotApplicable as error:
                    logger.info("%s is left out: %s", each.name, error.reason)

    def _refuse(self, intervention: Intervention, refusal: NotApplicable, by_user: bool) -> None:
        """Log, audit and remember an intervention that did not fit."""
        if by_user:
            logger.warning("%s is not applied: %s", intervention.name, refusal.reason)
        self.policy.note_refused(intervention, refusal)
        first = intervention.issues[0] if intervention.issues else None
        layer, head = (None, None) if first is None else (first.layer, first.head)
        more = {} if first is None else {"issue_type": first.issue_type}
        more |= {"why": refusal.reason, "note": refusal.advice}
        self._audit("refused", intervention.name, layer, head, **more)

    def _audit(
        self, action: str, name: str | None, layer: str | None, head: int | None, **more: Any
    ) -> None:
        """Write an audit record of something that was not done."""
        record = {"intervention": name, "action": action, "step": self.run.step}
        self.run.audit({**record, "layer": layer, "head": head, **more})
