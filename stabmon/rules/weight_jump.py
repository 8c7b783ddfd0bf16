"""Weights that something other than the optimizer's steps has multiplied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, Positive
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import LOSS, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, number


@rule
@dataclass(frozen=True)
class WeightJump(Rule):
    r"""Weights multiplied between two readings.

    All of one part of the model.

    With u the largest relative update of the part by one step that readings know, n steps can
    change the norm of its weights by a factor of :math:`e^{nu}` at most. A norm that has changed by
    more than ``slack`` times that in the logarithm, and at least by the factor ``jump``, was
    changed by something else: a weight that is scaled in place, a part that is loaded or
    initialised anew. Growth is an alarm, shrinkage a warning. Attributed to the part: an embedding,
    an output head, an attention layer or a module beside one in its block.

    Example:
        >>> from stabmon.records import PartChange, Reading
        >>> history = History()
        >>> for step in range(5, 30, 5):
        ...     weight = 900.0 if step == 25 else 9.0
        ...     parts = {"embed": PartChange(weight=weight, before=9.0, update=0.01)}
        ...     history.add(Reading(step, 2.0, {}, parts=parts))
        >>> WeightJump().check(history)
        [StabilityIssue(error weight_jump, embed, step 25, value 100, threshold 2)]
    """

    symptom: ClassVar[Symptom] = LOSS
    quantity: ClassVar[str] = "norm of weights"
    cause_rank: ClassVar[int] = 0
    explains_others: ClassVar[bool] = True

    jump: Positive = 2.0
    """Factor by which the norm of a part's weights has changed at least."""
    slack: Positive = 2.0
    """Times the change that the known updates explain."""
    past: Count = 22
    """Number of newest readings from which a step's largest update is taken."""
    min_history: Count = 3
    """Number of known updates of a part needed before it is judged."""

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the norm beside the one before in words."""
        worst = issues[0]
        norm, before = known(worst.evidence, "norm"), known(worst.evidence, "norm_before")
        numbers = f"norm of the weights {number(worst.value)} times the one before"
        if norm is not None and before is not None:
            numbers += f" ({number(before)}, now {number(norm)})"
        return Description("weights were multiplied", numbers, worst.suggestion)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each part; ``value`` is its norm over the one before."""
        if len(history) < 2:
            return []
        return [issue for part in history.latest.parts for issue in self._of_part(history, part)]

    def _of_part(self, history: History, part: str) -> list[StabilityIssue]:
        readings = history.readings[-self.past :]
        now, steps = history.latest.parts[part], readings[-1].step - readings[-2].step
        updates = [each.parts[part].update for each in readings[:-1] if part in each.parts]
        updates = [each for each in updates if math.isfinite(each)]
        if len(updates) < self.min_history or not (now.before > 0 and now.weight > 0):
            return []
        change = math.log(now.weight / now.before)
        level = max(math.log(self.jump), self.slack * steps * max(updates))
        if not (math.isfinite(change) and abs(change) > level):
            return []
        ratio, grown = math.exp(change), change > 0
        evidence = {
            "norm": now.weight,
            "norm_before": now.before,
            "largest_usual_update": float(np.max(updates)),
            "steps": steps,
        }
        suggestion = (
            f"Look at what changes {part} besides the optimizer in the {steps} steps before: its "
            f"weights are {ratio:.2g} times as large, and steps change them by "
            f"{max(updates):.1%} at most. Undo that, or go back to a checkpoint before it."
        )
        return [
            StabilityIssue(
                history.latest.step,
                part,
                None,
                "weight_jump",
                "error" if grown else "warning",
                ratio,
                math.exp(level if grown else -level),
                suggestion,
                evidence,
            )
        ]
