"""Base class and registry of rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, TypeVar

from stabmon.records import SEVERITIES, StabilityIssue
from stabmon.registry import Registry
from stabmon.rules.symptoms import Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import growth, past, with_limit


class Rule:
    """Base class of rules: frozen dataclasses whose fields are their levels.

    Example:
        >>> from dataclasses import dataclass
        >>> import numpy as np
        >>> from stabmon.records import Reading
        >>> from stabmon.rules.symptoms import SCORES
        >>> @dataclass(frozen=True)
        ... class UniformAttention(Rule):
        ...     symptom = SCORES
        ...     above: float = 0.99
        ...     def check(self, history):
        ...         entropy = history.now("normalized_entropy")
        ...         for n in (entropy > self.above).nonzero()[0]:
        ...             layer, head = history.heads[n]
        ...             yield StabilityIssue(
        ...                 history.latest.step, layer, head, "uniform_attention", "warning",
        ...                 entropy[n], self.above, "Train longer, or with a higher rate.")
        >>> history = History()
        >>> history.add(Reading(10, 2.5, {"attn": {"normalized_entropy": np.array([0.7, 0.995])}}))
        >>> [(issue.head, issue.threshold) for issue in UniformAttention().check(history)]
        [(1, 0.99)]
    """

    symptom: ClassVar[Symptom | None] = None
    """Failure mode of its issues; None if no intervention treats it."""
    issue_types: ClassVar[tuple[str, ...]] = ()
    """Types of its issues; empty for its own name alone."""
    value_of: ClassVar[str | None] = None
    """Signal whose value its issues report; None where they report another quantity."""
    quantity: ClassVar[str] = ""
    """Name of the value of its issues, for readers; empty for its signal's or its own name."""
    cause_rank: ClassVar[int] = 50
    """Order among issues of one symptom: the smallest names what they have in common."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of a reading without which the rule cannot fire, or not for single layers."""
    explains_others: ClassVar[bool] = False
    """True if its issues explain others of the same step: they are listed first.

    Of several of the same severity.
    """

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return every issue that holds at the newest reading.

        Called once a sampled step for all heads of the model at once: compute on whole ``[T, N]``
        arrays, and build an issue only for anomalous heads. Where an issue is open already
        (``history.is_open(issue_type)``), use the milder, closing level. Must not raise on NaN, inf
        or a short history.

        Args:
            history: the readings so far; T readings, N heads over all layers.

        Returns:
            At most one issue for each type, layer and head; of several the most severe counts.
        """
        raise NotImplementedError

    def looks_back(self) -> LooksBack | None:
        """Return the part of the history that :meth:`check` looks at; None for all of it.

        Ranks other than 0 keep no more of a model of very many heads than its rules declare.
        """
        return None

    @classmethod
    def symptom_of(cls, issue: StabilityIssue) -> Symptom | None:
        """Return the failure mode of one of its issues; :attr:`symptom` unless overridden.

        Args:
            issue: an issue that this rule reported.
        """
        return cls.symptom

    @classmethod
    def has_own_cause(cls, issue: StabilityIssue) -> bool:
        """Return True if an issue cannot follow from another, whatever else is open.

        Args:
            issue: an issue that this rule reported.
        """
        return False

    @classmethod
    def is_judged_by_risk(cls, issue: StabilityIssue) -> bool:
        """Return True if the risk of the layer decides whether an issue is an alarm.

        Args:
            issue: an issue that this rule reported.
        """
        return False

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest value of the quantity that an open issue reports.

        Args:
            issue: an open issue that this rule reported.
            history: the readings so far.

        Returns:
            None where the newest reading does not have it. By default it is that of
            :attr:`value_of`, the extreme over heads for an issue of a layer.
        """
        return None if cls.value_of is None else history.value_at(cls.value_of, issue)

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return some of its issues in words, all of one step.

        Args:
            issues: at least one, the worst first.
            framework: ``transformers``, ``lightning`` or ``loop``, for advice and code.

        Example:
            >>> issue = StabilityIssue(7, "h.0", 3, "dead_head", "warning", 0.1, 0.2, "Prune it.")
            >>> Rule.describe([issue], "loop").numbers
            'dead head 0.1 (limit 0.2)'
        """
        worst = issues[0]
        name = worst.issue_type.replace("_", " ")
        numbers = with_limit(cls.quantity or (cls.value_of or name).replace("_", " "), worst)
        words = numbers + past(worst.evidence) + growth(worst.evidence)
        return Description(name, words, worst.suggestion)

    @classmethod
    def is_recovering(cls, issue: StabilityIssue, history: History) -> bool:
        """Return True if an open issue needs no intervention: its head is recovering.

        Args:
            issue: an open issue that this rule reported.
            history: the readings so far.
        """
        return False


RULES: Registry[type[Rule]] = Registry("rule", package="stabmon.rules")
R = TypeVar("R", bound=type[Rule])


def rule(cls: R) -> R:
    """Register a rule under its class name in snake case.

    Returns:
        The class, unchanged.

    Raises:
        ValueError: if another rule has that name.

    Example:
        >>> RULES["entropy_collapse"].__name__
        'EntropyCollapse'
    """
    RULES.register(rule_name(cls), cls)
    return cls


def rule_name(cls: type) -> str:
    """Return the config name of a rule's class: its name in snake case.

    >>> rule_name(Rule)
    'rule'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def rule_of(issue_type: str) -> type[Rule] | None:
    """Return the rule that reports issues of a type; None where no installed one does."""
    if issue_type in RULES:
        return RULES[issue_type]
    named = ((cls, getattr(cls, "issue_types", ())) for _, cls in RULES.items())
    return next((cls for cls, types in named if issue_type in types), None)


def symptom_of(issue: StabilityIssue) -> Symptom | None:
    """Return the symptom that an issue's rule declares; None where it declares none."""
    found = rule_of(issue.issue_type)
    # rules of other packages need not be subclasses of Rule
    return found.symptom_of(issue) if found and hasattr(found, "symptom_of") else None


def worsened(now: StabilityIssue, before: StabilityIssue) -> bool:
    """Return True if an issue is clearly worse than when it was last reported.

    It is when it rests on something newly found (``found_at`` in its evidence), when its severity
    rose, or when at the same severity its value is ``WORSE`` times as far out: beyond its threshold
    by that factor more (both positive), else that much further from it. A value that is infinite or
    NaN is as far out as can be.

    Args:
        now: the issue at the newest reading.
        before: the same issue as it was last reported.
    """
    if now.evidence.get("found_at", 0) != before.evidence.get("found_at", 0):
        return True
    rise = SEVERITIES.index(now.severity) - SEVERITIES.index(before.severity)
    return rise > 0 or (rise == 0 and _distance(now) >= WORSE * _distance(before))


WORSE = 3.0
"""Least ratio of distances from the threshold at which an issue is reported again.

At less, an issue of steady growth would be repeated at every other reading.
"""
FARTHEST = 1_000.0
"""Distance beyond which an issue is not reported again.

An entropy of 1e-9 is no worse than one of 1e-6.
"""


def _distance(issue: StabilityIssue) -> float:
    """Return the ratio of value and threshold, between 1 and ``FARTHEST``."""
    value, threshold = issue.value, issue.threshold
    if not (math.isfinite(value) and math.isfinite(threshold)):
        return FARTHEST
    if value > 0 and threshold > 0:
        return min(max(value / threshold, threshold / value), FARTHEST)
    return min(1 + abs(value - threshold) / max(abs(threshold), 1.0), FARTHEST)
