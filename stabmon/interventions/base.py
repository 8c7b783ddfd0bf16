"""The base of interventions, the record of an applied one, and their registry."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from stabmon._display.html import card, line
from stabmon._settings import NOT_A_SETTING, check, settings_of
from stabmon._storage.stored_value import Stored
from stabmon.incidents import intervention_text
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
    """A change to a training run that can be undone.

    Its dataclass fields are its settings. A subclass overrides :meth:`_start`, which changes the
    run and returns an :class:`~stabmon.interventions.effects.effect.Effect` that can take the
    change back. It declares in class attributes when the guard is to choose it; the guard knows no
    intervention by name. One of another package is found by its entry point in the group
    ``stabmon.interventions``.

    Raises:
        ValueError: for an invalid setting, naming it.

    Example:
        An intervention that zeroes the momentum of an optimizer, applied to a run and undone:

        >>> import torch
        >>> class MomentumZeroed(Effect):
        ...     def __init__(self, buffers):
        ...         super().__init__(resources=frozenset(["momentum"]))
        ...         self.saved = [(each, each.clone()) for each in buffers]
        ...         for each in buffers:
        ...             each.zero_()
        ...     def undo(self):
        ...         for each, value in self.saved:
        ...             each.copy_(value)
        ...         return True
        >>> @dataclass(frozen=True)
        ... class ZeroMomentum(Intervention):
        ...     treats = {"loss": 50}
        ...     once = True
        ...     def _start(self, run):
        ...         states = run.torch_optimizer.state.values()
        ...         return MomentumZeroed([each["momentum_buffer"] for each in states])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> momentum = optimizer.state[model.weight]["momentum_buffer"]
        >>> applied = ZeroMomentum().apply(TrainingRun(model, optimizer, step=1))
        >>> momentum.tolist()
        [[0.0, 0.0]]
        >>> applied.undo(), momentum.tolist()
        (True, [[1.0, 1.0]])
    """

    treats: ClassVar[Mapping[str, int]] = {}
    """Names of the symptoms that it treats, each with its order: the smallest is tried first.

    A rule declares the symptom of its issues (``Rule.symptom``, see :mod:`stabmon.rules.symptoms`).
    The guard proposes an intervention only for alarms with a symptom in this mapping. Where several
    interventions treat one symptom, the guard tries them by increasing order, and by name where
    that is equal.
    """
    after: ClassVar[tuple[str, ...]] = ()
    """Names of interventions of which one must precede it, for :meth:`is_due` to read.

    ``rollback`` comes at once, whatever the order, after ``cap_learning_rate``: the cap prevents
    the next failure, and the rollback removes the damage of the last.
    """
    cost: ClassVar[float] = 0.0
    """Increase of a healthy run's final loss, in nats, as measured on a small byte-level GPT.

    Infinite where not measured. If the alarm is still open after the budget's ``patience``, the
    guard takes an intervention with a cost back, and keeps one without.
    """
    affects_whole_run: ClassVar[bool] = False
    """True if it changes the whole run, whatever head it was chosen for, as a learning rate does.

    While the outcome of one is pending, no other such is applied: it could not be judged.
    """
    install_at_start: ClassVar[bool] = False
    """True if it helps only when it is in place before anything is wrong, as ``skip_step`` does.

    The guard applies it before the first step, without an alarm.
    """
    once: ClassVar[bool] = False
    """True if it acts once, at :meth:`apply`, so that nothing can be held from step to step."""
    ends_round: ClassVar[bool] = False
    """True if nothing else is applied at the same sampled step, as after a rollback.

    The open issues are then those of a state that the run has left.
    """
    renews: ClassVar[bool] = False
    """True if it may be repeated for an issue whose cause was found after its last use.

    The step of the finding is ``found_at`` in the issue's evidence. Without it an intervention is
    not repeated where it failed.
    """
    state_key: ClassVar[str] = ""
    """Key of the state of :meth:`prepare` in a stored guard; empty for the intervention's name."""

    issues: tuple[StabilityIssue, ...] = field(
        default=(), kw_only=True, compare=False, repr=False, metadata=NOT_A_SETTING
    )
    """The issues that it is to repair."""
    why: str = field(default="", kw_only=True, compare=False, repr=False, metadata=NOT_A_SETTING)
    """The reason for choosing it, for the record."""

    def __post_init__(self) -> None:
        check(self, key=self.name)

    @property
    def name(self) -> str:
        """Its name in configurations and records."""
        return intervention_name(type(self))

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings, as plain values."""
        return settings_of(self)

    def aimed_at(self: Self, issues: Sequence[StabilityIssue], why: str = "") -> Self:
        """Return the same intervention for other issues.

        Args:
            issues: the issues that it is to repair.
            why: the reason for choosing it; empty to keep the present one.

        Returns:
            A copy with the same settings.

        Example:
            >>> from stabmon.interventions.stop import Stop
            >>> issue = StabilityIssue(7, None, None, "loss_spike", "error", 9.0, 3.0, "")
            >>> Stop().aimed_at([issue]).issues[0].issue_type
            'loss_spike'
        """
        return replace(self, issues=tuple(issues), why=why or self.why)

    def apply(self, run: TrainingRun, issue: StabilityIssue | None = None) -> Applied:
        """Change the run, and write the audit record.

        To be called after an optimizer step and before the next forward.

        Args:
            run: the run.
            issue: the issue that it is to repair, instead of ``self.issues``.

        Returns:
            A record of it, whose ``undo()`` takes it back.

        Raises:
            NotApplicable: if it does not fit; then nothing was changed.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> applied = Stop(why="asked for").apply(run)
            >>> run.stop_reason, applied.record["after"]
            ('asked for', {'stop': 'asked for'})
        """
        intervention = self if issue is None else self.aimed_at([issue])
        effect = intervention._start(run)
        return Applied(intervention, run, effect, step=run.step).write_audit("applied")

    def order_for(self, symptom: str) -> int | None:
        """Return its order among the interventions that treat a symptom.

        Override it where the order depends on the settings, as that of ``lower_learning_rate`` does
        on which rates it lowers; else declare :attr:`treats`.

        Args:
            symptom: the symptom's name.

        Returns:
            The order, smallest first; None where it does not treat the symptom.

        Example:
            >>> from stabmon.interventions.stop import Stop
            >>> Stop().order_for("non_finite"), Stop().order_for("scores")
            (20, None)
        """
        return self.treats.get(symptom)

    def unsuited(self, run: TrainingRun, symptom: str) -> str:
        """Return the reason for which it cannot help against a symptom now.

        The guard then skips it, and reports the reason where no other intervention is left.

        Args:
            run: the run.
            symptom: the symptom's name.

        Returns:
            The reason; empty where it may help.

        Example:
            >>> from stabmon.interventions.stop import Stop
            >>> Stop().unsuited(TrainingRun(None), "non_finite")
            ''
        """
        return ""

    def needless(self, run: TrainingRun) -> str:
        """Return the reason for which guard leaves it out at the places of its issues now.

        A person may apply it all the same.

        Args:
            run: the run.

        Returns:
            The reason; empty where it may help.

        Example:
            >>> from stabmon.interventions.stop import Stop
            >>> Stop().needless(TrainingRun(None))
            ''
        """
        return ""

    def affordable(self, run: TrainingRun, budget: Budget, uses: int) -> bool:
        """Return whether the budget allows one more use of it.

        The limits on all interventions together are checked elsewhere.

        Args:
            run: the run.
            budget: the limits.
            uses: number of times it was applied so far.

        Returns:
            True if it may be applied.

        Example:
            >>> from stabmon.interventions.rollback import Rollback
            >>> budget = Budget(max_rollbacks=1)
            >>> [Rollback().affordable(TrainingRun(None), budget, uses) for uses in (0, 1)]
            [True, False]
        """
        return True

    def is_due(self, issue: StabilityIssue, tried: Sequence[Applied]) -> bool:
        """Return whether it is next for an alarm at once, whatever the order of treatment.

        Args:
            issue: an open alarm.
            tried: interventions applied for it since its cause was found, see :attr:`after`.

        Returns:
            True to apply it next.

        Example:
            >>> from stabmon.interventions.rollback import Rollback
            >>> issue = StabilityIssue(7, None, None, "loss_spike", "error", 9.0, 3.0, "")
            >>> Rollback().is_due(issue, [])
            False
        """
        return False

    def prepare(self, run: TrainingRun) -> Prepared | None:
        """Return the state that it needs from before the first step on.

        The guard makes it when the run is set up, calls its ``begin()`` before the first step and
        ``offer()`` after each sampled one, and stores it. :meth:`_start` finds it by
        :meth:`~stabmon.interventions.run.training_run.TrainingRun.find_prepared`.

        Args:
            run: the run.

        Returns:
            The state; None where it needs none.

        Example:
            >>> import torch
            >>> from stabmon.interventions.rollback import Rollback
            >>> type(Rollback().prepare(TrainingRun(torch.nn.Linear(2, 1)))).__name__
            'HealthyStates'
        """
        return None

    def resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Applied:
        """Apply it again after a restart.

        Args:
            run: the run.
            state: a value of :meth:`Applied.state_dict`.

        Returns:
            Its record, in force again.

        Raises:
            NotApplicable: if it no longer fits.

        Example:
            >>> import torch
            >>> from stabmon.interventions.extend_warmup import ExtendWarmup
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> warmup = ExtendWarmup(steps=10, start=0.5)
            >>> state = warmup.apply(TrainingRun(model, optimizer)).state_dict()
            >>> resumed = TrainingRun(model, optimizer, step=5)
            >>> applied = warmup.resume(resumed, state)
            >>> resumed.rate_factor
            0.75
        """
        return Applied(
            self,
            run,
            self._resume(run, state["effect"]),
            step=int(state["step"]),
            record=state["record"],
        )

    def ended(self, run: TrainingRun, state: Mapping[str, Any]) -> Applied:
        """Return the record of one that is no longer in force.

        It counts among those tried, and changes nothing.

        Args:
            run: the run.
            state: a value of :meth:`Applied.state_dict`.

        Returns:
            Its record, with ``active`` False.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> state = Stop().apply(run).state_dict()
            >>> Stop().ended(TrainingRun(run.model), state).active
            False
        """
        over = Applied(self, run, Effect(), step=int(state["step"]), record=state["record"])
        over.active = False
        return over

    def check_saved(self, effect: Stored) -> None:
        """Check the stored state of its effect, without changing anything.

        Args:
            effect: the state, as read from a checkpoint.

        Raises:
            ValueError: if it is no such state, naming the place.

        Example:
            >>> from stabmon.interventions.extend_warmup import ExtendWarmup
            >>> ExtendWarmup().check_saved(Stored({"first": 3}, "effect"))
            >>> ExtendWarmup().check_saved(Stored({"first": "3"}, "effect"))
            Traceback (most recent call last):
            ValueError: ...
        """
        effect.mapping()

    @abstractmethod
    def _start(self, run: TrainingRun) -> Effect:
        """Change the run and return the effect.

        Raises:
            NotApplicable: if it does not fit; then nothing may have changed.
        """

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        """Return the effect again after a restart, from a value of its ``state_dict``.

        Here nothing is held: the whole effect is in the weights.
        """
        return Effect(note="its effect is in the checkpoint; it can no longer be undone")


class Applied:
    """An intervention that was applied.

    :meth:`Intervention.apply` and :meth:`Intervention.resume` make it.

    Args:
        intervention: the intervention.
        run: the run that it changed.
        effect: the change, and how to undo it.
        step: the optimizer step after which it was applied.
        record: its stored record; None to make one.

    Attributes:
        intervention: the intervention.
        step: the optimizer step after which it was applied.
        effect: the change, and how to undo it.
        record: intervention, location, before, after and reason as plain values; also passed to
            ``run.audit``.
        active: True while it is in force, that is neither undone nor released.
        by_user: True if a person applied it, so that only a person ends it.
        for_one_step: True if it is released after the next optimizer step.

    Example:
        >>> import torch
        >>> from stabmon.interventions.lower_learning_rate import LowerLearningRate
        >>> model = torch.nn.Linear(2, 1)
        >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> applied = LowerLearningRate(factor=0.5, where="all").apply(run)
        >>> run.rate_factor, applied.active
        (0.5, True)
        >>> applied.undo(), run.rate_factor
        (True, 1)
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
        self.by_user = self.for_one_step = False
        self._run = run
        self.record: dict[str, Any] = (
            dict(record) if record is not None else _record(intervention, effect, step)
        )
        run.applied.append(self)

    def __repr__(self) -> str:
        state = "active" if self.active else "ended"
        return f"Applied({self.intervention.name}, step={self.step}, {state})"

    def _repr_html_(self) -> str:
        """Return what it changed and why, for notebooks."""
        return card(repr(self), line(intervention_text({"action": "applied", **self.record})))

    def write_audit(self, action: str, **more: Any) -> Applied:
        """Write the record to the run's audit, and return ``self``.

        Args:
            action: the event, such as ``applied`` or ``undone``.
            **more: further entries, or others instead of the record's.

        Returns:
            This object.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> records = []
            >>> run = TrainingRun(torch.nn.Linear(2, 1), audit=records.append)
            >>> applied = Stop().apply(run).write_audit("noted", why="an example")
            >>> [(record["action"], record["why"]) for record in records]
            [('applied', 'asked for'), ('noted', 'an example')]
        """
        self._run.audit({**self.record, "action": action, "step": self._run.step, **more})
        return self

    def undo(self, why: str = "") -> bool:
        """Undo it, after later interventions on the same resources.

        A second call does nothing.
        Right after :meth:`Intervention.apply` the run is bit for bit what it was. Later, what
        training has changed since is kept: a factor is divided out again.

        Args:
            why: the reason, for the record and the log, where nobody asked for it.

        Returns:
            True if every bit that it changed is as it was.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> applied = Stop().apply(run)
            >>> applied.undo(), applied.active, run.stop_reason
            (True, False, None)
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
        self.write_audit("undone", exact=exact, **({"why": why} if why else {}))
        self._notify_end()
        if why:
            logger.warning(
                "%s of step %d is taken back: %s", self.intervention.name, self.step, why
            )
        return exact

    def release(self, why: str = "") -> None:
        """Stop holding it from step to step; changes of weights stay.

        Args:
            why: the reason, for the record and the log, where nobody asked for it.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> applied = Stop().apply(run)
            >>> applied.release()
            >>> applied.active
            False
        """
        if self.active:
            self.active = False
            self.effect.release()
            self.write_audit("released", **({"why": why} if why else {}))
            self._notify_end()
            if why:
                logger.info(
                    "%s of step %d is held no longer: %s", self.intervention.name, self.step, why
                )

    def hold_for_one_step(self) -> None:
        """Release it after the next optimizer step.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> applied = Stop().apply(run)
            >>> applied.hold_for_one_step()
            >>> run.step_hooks.fire("on_step")
            >>> applied.active
            False
        """
        self.for_one_step = True

        removers: list[Callable[[], None]] = []

        def end() -> None:
            removers.pop()()
            self.release("it was to be held for one step (hold=False)")

        removers.append(self._run.step_hooks.add("on_step", end))

    def relax(self) -> None:
        """Loosen it, after it was held for long without an alarm.

        Example:
            Most interventions have nothing to loosen:

            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> applied = Stop().apply(TrainingRun(torch.nn.Linear(2, 1)))
            >>> applied.relax()
            >>> applied.active
            True
        """
        if changed := self.effect.relax():
            self.write_audit(
                "relaxed",
                before={},
                after=dict(changed),
                why="no alarm for long, and it was still at work",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state with which a resumed run holds it again.

        Returns:
            Plain values, for JSON; :meth:`Intervention.resume` reads them.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> state = Stop().apply(TrainingRun(torch.nn.Linear(2, 1), step=3)).state_dict()
            >>> state["intervention"], state["step"], state["active"]
            ('stop', 3, True)
        """
        return {
            "intervention": self.intervention.name,
            "settings": self.intervention.settings,
            "issues": [issue.to_dict() for issue in self.intervention.issues],
            "why": self.intervention.why,
            "step": self.step,
            "record": self.record,
            "effect": self.effect.state_dict(),
            "active": self.active,
            "by_hand": self.by_user,
            "for_one_step": self.for_one_step,
        }

    def _notify_end(self) -> None:
        for notify in self._run.on_intervention_end:
            notify()


def _record(intervention: Intervention, effect: Effect, step: int) -> dict[str, Any]:
    issues = intervention.issues
    cause = f"{issues[0].issue_type} at {issues[0].where}" if issues else "asked for"
    layers, heads = {layer for layer, _ in effect.places}, {head for _, head in effect.places}
    return {
        "intervention": intervention.name,
        "step": step,
        "layer": layers.pop() if len(layers) == 1 else None,
        "head": heads.pop() if len(effect.places) == 1 else None,
        "places": [list(place) for place in effect.places],
        "issue_type": issues[0].issue_type if issues else None,
        "before": dict(effect.before),
        "after": dict(effect.after),
        "why": intervention.why or cause,
        "note": effect.note,
        "settings": intervention.settings,
    }


INTERVENTIONS: Registry[type[Intervention]] = Registry(
    "intervention", package="stabmon.interventions"
)
I_ = TypeVar("I_", bound=type[Intervention])


def intervention(cls: I_) -> I_:
    """Register an intervention under its class name in snake case.

    ``QkClip`` is ``qk_clip``.

    Args:
        cls: a dataclass derived from :class:`Intervention`.

    Returns:
        The class itself.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> _ = INTERVENTIONS["stop"]
        >>> @intervention
        ... class Stop(Intervention):
        ...     "A second one."
        Traceback (most recent call last):
        ValueError: intervention 'stop' is registered twice, ...
    """
    INTERVENTIONS.register(intervention_name(cls), cls)
    return cls


def intervention_name(cls: type) -> str:
    """Return the name of an intervention's class in configurations, in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
