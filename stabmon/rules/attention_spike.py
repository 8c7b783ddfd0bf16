"""A head's attention suddenly lands on single keys, or on the first key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, NonNegative, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.robust_stats import largest, robust_spread
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History


@rule
@renamed(least_past="min_history")
@dataclass(frozen=True)
class AttentionSpike(Rule):
    """A head's mean largest probability, or the mass on its first key, jumped up between two
    readings.

    Only ever a warning: sinks form within few steps in healthy training and are no pathology, and
        attention that collapses is
    ``entropy_collapse``. Read it as the time and place at which a head changed what it does.
    """

    symptom: ClassVar[Symptom] = SCORES

    rise: Fraction = 0.4
    """Rise of the probability, in [0, 1], over the largest of the readings before."""
    deviations: NonNegative = 6.0
    """Spreads of the head's own past that the rise must also be."""
    past: Count = 10
    """Readings that make up the past."""
    min_history: Count = 3
    """Readings that must be known before any is judged."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a head, on whichever of the two rose more; ``value`` is the probability."""
        if len(history) <= self.min_history:
            return []
        names = ("max_probability", "sink_mass")
        rise, level = np.full((2, len(names), len(history.heads)), np.nan)
        for row, name in enumerate(names):
            past = history.signal(name)[-self.past - 1 : -1]
            top = largest(past)
            level[row] = np.maximum(top + self.rise, top + self.deviations * robust_spread(past))
            rise[row] = history.now(name) - level[row]
        found = np.where(np.isnan(rise), -np.inf, rise)
        worst, spikes = found.argmax(axis=0), found.max(axis=0) > 0
        opened = history.open_level("attention_spike")
        still = ~spikes & (np.fmax(history.now(names[0]), history.now(names[1])) >= opened)
        issues = []
        for n in np.flatnonzero(spikes | still).tolist():
            name = names[int(worst[n])]
            threshold = float(level[worst[n], n]) if spikes[n] else float(opened[n])
            issues.append(self._issue(history, n, name, threshold))
        return issues

    def _issue(self, history: History, n: int, name: str, threshold: float) -> StabilityIssue:
        layer, head = history.heads[n]
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="attention_spike",
            severity="warning",
            value=float(history.now(name)[n]),
            threshold=threshold,
            suggestion=(
                "Nothing by itself: heads turn into sinks or copiers like this in healthy runs. "
                "Look at the head's scores and entropy, "
                "and at the rate, if logit_growth or entropy_collapse open beside it."
            ),
            evidence={
                "signal": name,
                "normalized_entropy": float(history.now("normalized_entropy")[n]),
            },
        )
