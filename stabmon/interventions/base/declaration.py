"""Declare the purpose of an intervention: settings, symptoms that it treats, issues to repair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from stabmon._settings import NOT_A_SETTING, check, settings_of
from stabmon.records import StabilityIssue

Self = TypeVar("Self", bound="Declaration")


ATTENTION_AND_LOSS = ("rate", "sustained_growth", "scores", "step", "loss")
"""Every symptom of stabmon's own rules but that of NaN and inf."""


@dataclass(frozen=True)
class Declaration:
    """Declaration of an intervention: the guard chooses by it, and records keep it.

    Nothing in here touches a run; :class:`~stabmon.interventions.base.intervention.Intervention`
    adds the change.
    """

    treats: ClassVar[Mapping[str, int]] = {}
    """Names of the symptoms that it treats, each with its order: the smallest is tried first.

    A rule declares the symptom of its issues (``Rule.symptom``, see :mod:`stabmon.rules.symptoms`).
    The guard proposes an intervention only for alarms with a symptom in this mapping. Where several
    interventions treat one symptom, the guard tries them by increasing order, and by name where
    that is equal.
    """
    after: ClassVar[tuple[str, ...]] = ()
    """Names of interventions of which one must precede it, for ``is_due`` to read.

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
    """True if it acts once, at ``apply``, so that nothing can be held from step to step."""
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
    """Key of the state of ``prepare`` in a stored guard; empty for the intervention's name."""

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


def intervention_name(cls: type) -> str:
    """Return the name of an intervention's class in configurations, in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
