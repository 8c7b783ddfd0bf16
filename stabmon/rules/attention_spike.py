"""Sudden concentration of a head's attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, NonNegative, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.robust_stats import largest, robust_spread
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import with_limit


@rule
@renamed(least_past="min_history")
@dataclass(frozen=True)
class AttentionSpike(Rule):
    """Sudden attention to single keys or to the first key.

    Of the head's mean largest probability and its mass on the first key, either must exceed the
    largest of the ``past`` readings before by ``rise`` and by ``deviations`` times their robust
    standard deviation.

    Only ever a warning: attention sinks form within few steps in healthy training and are no
    pathology, and attention that collapses is ``entropy_collapse``. Read it as the time and place
    at which a head changed what it does.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step, mass in enumerate([0.1, 0.12, 0.1, 0.11, 0.9], start=1):
        ...     history.add(Reading(step, None, {"attn": {"sink_mass": np.array([mass])}}))
        >>> AttentionSpike().check(history)
        [StabilityIssue(warning attention_spike, attn head 0, step 5, value 0.9, threshold 0.52)]

    References:
        Xiao et al. 2023, arXiv:2309.17453, and Gu et al. 2024, arXiv:2410.10781, on attention
        sinks.
    """

    symptom: ClassVar[Symptom] = SCORES
    cause_rank: ClassVar[int] = 60

    rise: Fraction = 0.4
    """Rise of the probability, in [0, 1], above the largest of the readings before."""
    deviations: NonNegative = 6.0
    """Robust standard deviations of the head's own past that the rise must also be."""
    past: Count = 10
    """Number of readings in the past."""
    min_history: Count = 3
    """Number of readings needed before any is judged."""

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest value of the probability that rose."""
        return history.value_at(str(issue.evidence.get("signal", "max_probability")), issue)

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the rise of the probability in words."""
        worst = issues[0]
        name = str(worst.evidence.get("signal", "probability")).replace("_", " ")
        return Description(f"{name} rose", with_limit(name, worst), worst.suggestion)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack(dict.fromkeys(("max_probability", "sink_mass"), self.past + 1))

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head, on the quantity that rose more.

        ``value`` is the probability, ``threshold`` the level that it exceeded.
        """
        if len(history) <= self.min_history:
            return []
        names = ("max_probability", "sink_mass")
        rise, level = np.full((2, len(names), len(history.heads)), np.nan)
        for row, name in enumerate(names):
            past = history.rows(name, slice(-self.past - 1, -1))
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
                "If logit_growth or entropy_collapse open beside it, check the head's scores, its "
                "entropy and the learning rate."
            ),
            evidence={
                "signal": name,
                "normalized_entropy": float(history.now("normalized_entropy")[n]),
            },
        )
