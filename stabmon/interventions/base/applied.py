"""An intervention in force on a run: its record, and how to undo, release or loosen it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from stabmon._display.html import card, line
from stabmon.incidents import intervention_text
from stabmon.interventions.base.declaration import Declaration
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.training_run import TrainingRun

logger = logging.getLogger("stabmon")


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
        intervention: Declaration,
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
        try:
            exact = self.effect.undo()
        except Exception:
            self.effect.release()  # keeps the change, but repeats it at no further step
            raise
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
            self.effect.release()
            self.active = False  # only now: a release that failed is tried again as the run ends
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


def _record(intervention: Declaration, effect: Effect, step: int) -> dict[str, Any]:
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
