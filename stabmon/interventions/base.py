"""What an intervention is, what applying one leaves behind, and the table of all interventions."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from stabmon._settings import NOT_A_SETTING, check, settings_of
from stabmon._storage.stored_value import Stored
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.training_run import Prepared, TrainingRun
from stabmon.records import StabilityIssue
from stabmon.registry import Registry

logger = logging.getLogger("stabmon")


Self = TypeVar("Self", bound="Intervention")


ATTENTION_AND_LOSS = ("rate", "sustained_growth", "scores", "step", "loss")
"""Every symptom of stabmon's own rules but that of NaN and inf."""


@dataclass(frozen=True)
class Intervention(ABC):
    """One act on a training run. Its dataclass fields are its settings; ``issues`` and ``why`` say
    what it is for.

    Raises:
        ValueError: for a setting that cannot be, naming it.
    """

    treats: ClassVar[Mapping[str, int]] = {}
    """Symptoms that it treats, by name, and its place among what treats them: the smallest first."""
    after: ClassVar[tuple[str, ...]] = ()
    """Interventions of which one must have been applied before :meth:`is_due` can hold."""
    cost: ClassVar[float] = 0.0
    """Nats of final loss that it was seen to cost a healthy run (small byte-level GPT); inf where
    that was not measured.
    """
    affects_whole_run: ClassVar[bool] = False
    """Changes the whole run, whatever head it was chosen for, so that no other such act beside it
    could be judged.
    """
    install_at_start: ClassVar[bool] = False
    """Can only help if it is in place before anything is wrong: applied when guarding begins."""
    once: ClassVar[bool] = False
    """Done at once and over: there is nothing that could be held from step to step."""

    state_key: ClassVar[str] = ""
    """Key of the prepared state in a stored guard; empty for the intervention's name."""
    ends_round: ClassVar[bool] = False
    """Nothing else is done at the same sample: open issues are of a state that is left behind."""
    renews: ClassVar[bool] = False
    """May be done again for an issue that rests on something found after it was last done
    (``found_at`` in the evidence).
    """

    issues: tuple[StabilityIssue, ...] = field(
        default=(), kw_only=True, compare=False, repr=False, metadata=NOT_A_SETTING
    )
    """What it is to repair."""
    why: str = field(default="", kw_only=True, compare=False, repr=False, metadata=NOT_A_SETTING)
    """Why it was chosen, for the record."""

    def __post_init__(self) -> None:
        check(self, key=self.name)

    @property
    def name(self) -> str:
        """Its config name."""
        return intervention_name(type(self))

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings, as plain values."""
        return settings_of(self)

    def aimed_at(self: Self, issues: Sequence[StabilityIssue], why: str = "") -> Self:
        """The same act, for these issues."""
        return replace(self, issues=tuple(issues), why=why or self.why)

    def apply(self, run: TrainingRun, issue: StabilityIssue | None = None) -> Applied:
        """Do it, and write the audit record.

        To be called after an optimizer step and before the next forward.

        Args:
            run: what may be touched.
            issue: what it is to repair, instead of ``self.issues``.

        Raises:
            NotApplicable: if it does not fit; then nothing was changed.
        """
        act = self if issue is None else self.aimed_at([issue])
        return Applied(act, run, act._start(run), step=run.step).noted("applied")

    def order_for(self, symptom: str) -> int | None:
        """Return its place among what treats a symptom; None where it does not treat it."""
        return self.treats.get(symptom)

    def unsuited(self, run: TrainingRun, symptom: str) -> str:
        """Return why it cannot help against a symptom at this time; empty where it may."""
        return ""

    def affordable(self, run: TrainingRun, budget: Budget, uses: int) -> bool:
        """Return whether the budget allows it once more.

        Args:
            run: the run.
            budget: the limits.
            uses: times that it was applied so far.
        """
        return True

    def is_due(self, issue: StabilityIssue, tried: Sequence[Applied]) -> bool:
        """Return whether it comes next for an alarm, whatever the order.

        Args:
            issue: an open alarm.
            tried: interventions applied for it since its cause was found.
        """
        return False

    def prepare(self, run: TrainingRun) -> Prepared | None:
        """Keep what it needs from before the first step on; None where that is nothing."""
        return None

    def resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Applied:
        """Go on with what :meth:`Applied.state_dict` described, after a restart.

        Raises:
            NotApplicable: if it no longer fits.
        """
        return Applied(
            self,
            run,
            self._resume(run, state["effect"]),
            step=int(state["step"]),
            record=state["record"],
        )

    def ended(self, run: TrainingRun, state: Mapping[str, Any]) -> Applied:
        """The same, of one that is no longer in force: it counts among what was tried, and does
        nothing.
        """
        over = Applied(self, run, Effect(), step=int(state["step"]), record=state["record"])
        over.active = False
        return over

    def check_saved(self, effect: Stored) -> None:
        """Raise a ValueError, naming the place, where ``effect`` is not what its effect's
        ``state_dict`` gives.
        """
        effect.mapping()

    @abstractmethod
    def _start(self, run: TrainingRun) -> Effect:
        """Change the run, or raise :class:`NotApplicable` and leave it as it was."""

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        """Take up a held effect again; acts whose whole effect is in the weights have nothing to
        hold.
        """
        return Effect(note="its effect is in the checkpoint; it can no longer be undone")


class Applied:
    """An intervention that was applied.

    Attributes:
        intervention: the act.
        step: the optimizer step after which it was applied.
        record: what, where, before, after and why, as plain values; also handed to ``run.audit``.
        active: whether it is still in force, that is neither undone nor released.
        by_hand: whether a person applied it, so that only a person ends it.
        for_one_step: whether it is released after the next optimizer step.
    """

    def __init__(
        self,
        intervention: Intervention,
        run: TrainingRun,
        effect: Effect,
        *,
        step: int,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.intervention = intervention
        self.step = step
        self.effect = effect
        self.active = True
        self.by_hand = self.for_one_step = False
        self._run = run
        self.record: dict[str, Any] = (
            dict(record) if record is not None else _record(intervention, effect, step)
        )
        run.applied.append(self)

    def noted(self, action: str, **more: Any) -> Applied:
        """Write the record to the run's audit, with what happened."""
        self._run.audit({**self.record, "action": action, "step": self._run.step, **more})
        return self

    def undo(self, why: str = "") -> bool:
        """Restore what was there before, and later acts on the same things first. The second call
        does nothing.

        Right after :meth:`Intervention.apply` the run is bit for bit what it was. Later, what
        training has changed since is
        kept: a factor is divided out again.

        Args:
            why: the reason, for the record and the log, where nobody asked for it.

        Returns:
            Whether every bit that it changed is as it was.
        """
        if not self.active:
            return True
        for later in reversed(self._run.applied[self._run.applied.index(self) + 1 :]):
            if later.active and later.effect.resources & self.effect.resources:
                later.undo(
                    why and f"{self.intervention.name}, which it came after, is taken back: {why}"
                )
        self.active = False
        exact = self.effect.undo()
        self.noted("undone", exact=exact, **({"why": why} if why else {}))
        if why:
            logger.warning(
                "%s of step %d is taken back: %s", self.intervention.name, self.step, why
            )
        return exact

    def release(self, why: str = "") -> None:
        """End what is held from step to step; what is in the weights stays.

        Args:
            why: the reason, for the record and the log, where nobody asked for it.
        """
        if self.active:
            self.active = False
            self.effect.release()
            self.noted("released", **({"why": why} if why else {}))
            if why:
                logger.info(
                    "%s of step %d is held no longer: %s", self.intervention.name, self.step, why
                )

    def hold_for_one_step(self) -> None:
        """Release it after the next optimizer step."""
        self.for_one_step = True

        def end() -> None:
            remove()
            self.release("it was to be held for one step (hold=False)")

        remove = self._run.step_hooks.add("on_step", end)

    def relax(self) -> None:
        """Hold less tightly what has been held for long without an alarm."""
        if changed := self.effect.relax():
            self.noted(
                "relaxed",
                before={},
                after=dict(changed),
                why="no alarm for long, and it was still at work",
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to hold it further: plain values, for JSON."""
        return {
            "intervention": self.intervention.name,
            "settings": self.intervention.settings,
            "issues": [issue.to_dict() for issue in self.intervention.issues],
            "why": self.intervention.why,
            "step": self.step,
            "record": self.record,
            "effect": self.effect.state_dict(),
            "active": self.active,
            "by_hand": self.by_hand,
            "for_one_step": self.for_one_step,
        }


def _record(act: Intervention, effect: Effect, step: int) -> dict[str, Any]:
    layers, heads = {layer for layer, _ in effect.places}, {head for _, head in effect.places}
    return {
        "intervention": act.name,
        "step": step,
        "layer": layers.pop() if len(layers) == 1 else None,
        "head": heads.pop() if len(effect.places) == 1 else None,
        "places": [list(place) for place in effect.places],
        "issue_type": act.issues[0].issue_type if act.issues else None,
        "before": dict(effect.before),
        "after": dict(effect.after),
        "why": act.why
        or (f"{act.issues[0].issue_type} at {act.issues[0].where}" if act.issues else "asked for"),
        "note": effect.note,
        "settings": act.settings,
    }


INTERVENTIONS: Registry[type[Intervention]] = Registry(
    "intervention", package="stabmon.interventions"
)
I_ = TypeVar("I_", bound=type[Intervention])


def intervention(cls: I_) -> I_:
    """Register an intervention under its class name in snake case: ``QkClip`` is ``qk_clip``."""
    INTERVENTIONS.register(intervention_name(cls), cls)
    return cls


def intervention_name(cls: type) -> str:
    """The config name of an intervention's class: its name in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
