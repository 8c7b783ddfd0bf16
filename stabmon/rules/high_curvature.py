"""Sudden rise of attention curvature."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, NonNegative, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.robust_stats import largest, robust_spread
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack


@rule
@renamed(least_past="min_history")
@dataclass(frozen=True)
class HighCurvature(Rule):
    """Jump of a head's curvature above its own past.

    Its logarithm, ``hnf_log_curvature``, must exceed the largest of the ``past`` readings before by
    ``jump`` and by ``deviations`` times their robust standard deviation.

    The curvature is polynomial in the norms of query and key and vanishes as rows saturate, so no
    level of it is wrong in itself and none does damage by itself: only ever a warning. A jump means
    that a step of the usual size moves this head's attention much further than before. The
    exponential bound ``hnf_log_curvature_bound`` is not used: it only orders heads by score.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step, value in enumerate([1.0, 1.1, 1.0, 1.05, 6.0], start=1):
        ...     history.add(Reading(step, None, {"attn": {"hnf_log_curvature": np.array([value])}}))
        >>> HighCurvature().check(history)
        [StabilityIssue(warning high_curvature, attn head 0, step 5, value 6, threshold 3.6)]
    """

    symptom: ClassVar[Symptom] = SCORES
    value_of: ClassVar[str] = "hnf_log_curvature"
    quantity: ClassVar[str] = "log curvature of the attention map"
    cause_rank: ClassVar[int] = 55

    jump: NonNegative = 2.5
    """Rise of the natural logarithm above the largest before; 2.5 is twelvefold."""
    deviations: NonNegative = 6.0
    """Robust standard deviations of the head's own past that the rise must also be."""
    past: Count = 10
    """Number of readings in the past."""
    min_history: Count = 3
    """Number of readings needed before any is judged."""

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({"hnf_log_curvature": self.past + 1})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head; ``value`` is its ``hnf_log_curvature``."""
        if len(history) <= self.min_history:
            return []
        now = history.now("hnf_log_curvature")
        past = history.rows("hnf_log_curvature", slice(-self.past - 1, -1))
        known = np.isfinite(past).sum(axis=0) >= self.min_history
        top = largest(past)
        level = np.maximum(top + self.jump, top + self.deviations * robust_spread(past))
        opened = history.open_level("high_curvature")
        found = known & np.isfinite(now) & (now >= level)
        still = np.isfinite(now) & (now >= opened - self.jump / 2)
        return [
            self._issue(history, n, float(level[n] if found[n] else opened[n]), float(top[n]))
            for n in np.flatnonzero(found | still).tolist()
        ]

    def _issue(self, history: History, n: int, level: float, top: float) -> StabilityIssue:
        layer, head = history.heads[n]
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="high_curvature",
            severity="warning",
            value=float(history.now("hnf_log_curvature")[n]),
            threshold=level,
            suggestion=(
                "Find what changed the norms of this head's query and key just before (rate, "
                "weight edit, data); normalising query and key bounds this curvature."
            ),
            evidence={"past_largest": top, "max_logit": float(history.now("max_logit")[n])},
        )
