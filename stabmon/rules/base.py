"""What a rule is, and the table of all rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from stabmon.records import SEVERITIES, StabilityIssue
from stabmon.registry import Registry

if TYPE_CHECKING:
    from stabmon.rules.tracking.history import History


class Rule(Protocol):
    """A frozen dataclass whose fields are its levels, and whose ``check`` says what is ill now."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Every issue of this rule's type that holds at the history's newest reading.

        Called once a sampled step for all heads of the model at once: compute on whole ``[T, N]``
        arrays and build a :class:`StabilityIssue` only for the heads that are ill. Hysteresis: for
        a head whose issue is open already (``history.is_open(issue_type)``) use the milder, closing
        level. Never raises on NaN, inf or a short history.
        """
        ...


RULES: Registry[type[Rule]] = Registry("rule", package="stabmon.rules")
R = TypeVar("R", bound=type)


def rule(cls: R) -> R:
    """Register a rule under its class name in snake case: ``EntropyCollapse`` is
    ``entropy_collapse``.
    """
    RULES.register(rule_name(cls), cls)
    return cls


def rule_name(cls: type) -> str:
    """The config name of a rule's class: its name in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def worsened(now: StabilityIssue, before: StabilityIssue) -> bool:
    """Whether an issue is clearly worse than when it was last told of.

    It is when it rests on something newly found (``found_at`` in its evidence), when its severity
    rose, or when at the same severity its value is ``WORSE`` times as far out: beyond its threshold
    by that factor more (both positive), else that much further from it. A value that is infinite or
    NaN is as far out as can be.
    """
    if now.evidence.get("found_at", 0) != before.evidence.get("found_at", 0):
        return True
    rise = SEVERITIES.index(now.severity) - SEVERITIES.index(before.severity)
    return rise > 0 or (rise == 0 and _distance(now) >= WORSE * _distance(before))


WORSE = 3.0
"""A value three times as far out is news; less would repeat an issue that goes on growing at every
other reading.
"""
FARTHEST = 1_000.0
"""Beyond this distance nothing is news any more: an entropy of 1e-9 is no worse than one of
1e-6.
"""


def _distance(issue: StabilityIssue) -> float:
    """How far a value is beyond its threshold, as a ratio between 1 and ``FARTHEST``."""
    value, threshold = issue.value, issue.threshold
    if not (math.isfinite(value) and math.isfinite(threshold)):
        return FARTHEST
    if value > 0 and threshold > 0:
        return min(max(value / threshold, threshold / value), FARTHEST)
    return min(1 + abs(value - threshold) / max(abs(threshold), 1.0), FARTHEST)
