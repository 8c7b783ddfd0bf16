"""An open incident: its issues, its cause, and what was said of it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from stabmon.incidents.incident import Incident
from stabmon.incidents.wording import (
    closing_numbers,
    describe,
    effects_text,
    forecast_text,
    worst_first,
)
from stabmon.records import SEVERITIES, Severity, StabilityIssue
from stabmon.rules.base import rule_of, symptom_of
from stabmon.rules.wording.description import locate

NO_SYMPTOM = 100
"""Place in the causal chain of issues whose rule declares no symptom."""
SPREAD = 4
"""Growth of the number of layers that is reported again."""
FARTHER = 10.0
"""Growth of the value's ratio to its threshold that is reported again."""
Key = tuple[str, str | None, int | None]
_Rank = tuple[bool, tuple[int, str]]
"""Rank of an issue: False for an alarm, then its group; the least one is the cause."""


def group_of(issue: StabilityIssue) -> tuple[int, str]:
    """Return the place of an issue in the causal chain, and the name of its symptom."""
    symptom = symptom_of(issue)
    if symptom is None:
        return NO_SYMPTOM, issue.issue_type
    return symptom.causal_order, symptom.name


def _rank(issue: StabilityIssue) -> _Rank:
    return not issue.is_alarm, group_of(issue)


def explains(incident: OpenIncident, issue: StabilityIssue) -> bool:
    """Return True if an issue belongs to an incident, as its like or as its effect."""
    if incident.group == group_of(issue):
        return True
    found = rule_of(issue.issue_type)
    if found is not None and getattr(found, "has_own_cause", lambda _: False)(issue):
        return False
    return incident.is_alarm and incident.order < group_of(issue)[0]


class OpenIncident:
    """Issues that have one cause, from the first that opened to the last that closes.

    Args:
        number: of the incident in the run.
        step: at which it opens.
    """

    def __init__(self, number: int, step: int) -> None:
        self.number, self.first_step = number, step
        self.issues: dict[Key, StabilityIssue] = {}
        """The open ones, as last emitted."""
        self.layers: dict[str, None] = {}
        self.heads: set[tuple[str | None, int]] = set()
        self.changed: list[StabilityIssue] = []
        """Issues of the present step."""
        self._ranks: Counter[_Rank] = Counter()
        """Open issues of each rank, so that hundreds of heads are not gone through at each."""
        self._last: tuple[int, str] = (NO_SYMPTOM, "")
        self._announced: Incident | None = None
        """Change against which others are news."""
        self._announced_distance = 1.0
        self._muted = False
        """That change was not shown: the same cause has come too often."""
        self._alarmed = False

    @property
    def group(self) -> tuple[int, str]:
        """Place in the causal chain, and symptom, of its cause."""
        return min(self._ranks)[1] if self._ranks else self._last

    @property
    def order(self) -> int:
        """Place of its cause in the causal chain."""
        return self.group[0]

    @property
    def is_alarm(self) -> bool:
        """True while an issue of severity error or above is open."""
        return any(not no_alarm for no_alarm, _ in self._ranks)

    @property
    def explains_earlier(self) -> bool:
        """True if its cause was at work before it was found."""
        causes = (each for each in self.issues.values() if group_of(each) == self.group)
        symptom = next((symptom_of(each) for each in causes), None)
        return symptom is not None and symptom.explains_earlier

    def start_step(self) -> None:
        """Begin a step without a change."""
        self.changed = []

    def add(self, issue: StabilityIssue) -> None:
        """Add an issue that opened or worsened."""
        self._uncount(self.issues.get(issue.key))
        self.issues[issue.key] = issue
        self._ranks[_rank(issue)] += 1
        self.changed.append(issue)
        self._alarmed |= issue.is_alarm
        self._last = self.group
        if issue.layer is not None:
            self.layers.setdefault(issue.layer)
        if issue.head is not None:
            self.heads.add((issue.layer, issue.head))

    def close_issue(self, issue: StabilityIssue) -> None:
        """Take an issue out that closed."""
        self._last = self.group
        self._uncount(self.issues.pop(issue.key))
        self.changed.append(issue)

    def _uncount(self, issue: StabilityIssue | None) -> None:
        """Take an issue that is open no longer, or has changed, out of the ranks."""
        if issue is not None:
            rank = _rank(issue)
            self._ranks[rank] -= 1
            if not self._ranks[rank]:
                del self._ranks[rank]

    def follows_from_it(self, other: OpenIncident) -> bool:
        """Return True if another incident follows from this one."""
        first = next(iter(other.issues.values()))
        return other is not self and other.order > self.order and explains(self, first)

    def absorb(self, other: OpenIncident) -> None:
        """Take over an incident that follows from this one."""
        self.number = min(self.number, other.number)
        self.first_step = min(self.first_step, other.first_step)
        self.issues = {**other.issues, **self.issues}
        self._ranks = Counter(map(_rank, self.issues.values()))
        self.layers = {**other.layers, **self.layers}
        self.heads |= other.heads
        self.changed += other.changed
        self._alarmed |= other._alarmed
        if self._announced is None:
            self._announced, self._muted = other._announced, other._muted

    def describe(self, step: int, framework: str, before: Incident | None) -> Incident:
        """Return the present change as a record.

        Args:
            step: the present step.
            framework: ``transformers``, ``lightning`` or ``loop``.
            before: the change before; None for the first.
        """
        changes = tuple(worst_first(self.changed))
        if not self.issues:
            return self._describe_closed(step, framework, changes, before)
        root = self._root()
        same = [each for each in self.issues.values() if _is_like(each, root)]
        others = [each for each in self.issues.values() if not _is_like(each, root)]
        words = describe(worst_first(same), framework)
        severity: Severity = max(
            (each.severity for each in self.issues.values()), key=SEVERITIES.index
        )
        return self._record(
            step,
            cause=root.issue_type,
            state="opened" if before is None else "worsened",
            severity=severity,
            title=words.title,
            where=locate(same),
            numbers=words.numbers,
            effects=effects_text(others, framework),
            forecast=forecast_text(same),
            advice=words.advice,
            code=words.code,
            issues=changes,
        )

    def is_news(self) -> bool:
        """Return whether the present change is worth a line: an alarm, and new in substance."""
        said = self._announced
        if not self.issues:
            return said is not None and not self._muted
        if said is None or self.is_graver():
            return self.is_alarm
        spread = len(self.layers) >= SPREAD * max(1, len(said.layers))
        farther = self._distance() >= FARTHER * self._announced_distance
        return self.is_alarm and (spread or farther)

    def is_graver(self) -> bool:
        """Return whether an open incident is new, of another cause or more severe than before."""
        said = self._announced
        rank = SEVERITIES.index
        return (
            said is None
            or self.has_new_cause()
            or rank(self._root().severity) > rank(said.severity)
        )

    def has_new_cause(self) -> bool:
        """Return whether an open incident was not reported with its present cause."""
        return self._announced is None or self._announced.cause != self._root().issue_type

    def note_announced(self, incident: Incident, *, muted: bool) -> None:
        """Remember the change against which later ones are news.

        Args:
            incident: the change.
            muted: it is not shown, since the same cause has come too often.
        """
        self._announced, self._muted = incident, muted
        self._announced_distance = self._distance() if self.issues else 1.0

    def _describe_closed(
        self,
        step: int,
        framework: str,
        changes: tuple[StabilityIssue, ...],
        before: Incident | None,
    ) -> Incident:
        cause = changes[0].issue_type if before is None else before.cause
        of_cause = [each for each in changes if each.issue_type == cause] or list(changes)
        title = describe(of_cause, framework).title if before is None else before.title
        numbers = "; ".join(dict.fromkeys(closing_numbers(each) for each in of_cause[:1]))
        where = locate(of_cause) if before is None else before.where
        return self._record(
            step,
            cause=cause,
            state="closed",
            severity="info",
            title=title,
            where=where,
            numbers=numbers,
            effects="",
            forecast="",
            advice="" if before is None else before.advice,
            code="" if before is None else before.code,
            issues=changes,
        )

    def _record(self, step: int, **found: Any) -> Incident:
        return Incident(
            number=self.number,
            step=step,
            first_step=self.first_step,
            layers=tuple(self.layers),
            heads=len(self.heads),
            announced=False,
            alerts=False,
            advises=False,
            alarmed=self._alarmed,
            **found,
        )

    def _root(self) -> StabilityIssue:
        """Return the issue that stands for the cause."""

        def rank(issue: StabilityIssue) -> tuple[Any, ...]:
            found = rule_of(issue.issue_type)
            order, _ = group_of(issue)
            return (not issue.is_alarm, order, getattr(found, "cause_rank", 50), issue.issue_type)

        first = min(self.issues.values(), key=rank)
        return worst_first([each for each in self.issues.values() if _is_like(each, first)])[0]

    def _distance(self) -> float:
        """Return the ratio of the cause's value and threshold, at least 1."""
        root = self._root()
        value, level = root.value, root.threshold
        if not (math.isfinite(value) and math.isfinite(level) and value > 0 and level > 0):
            return 1.0
        return max(value / level, level / value)


def _is_like(issue: StabilityIssue, other: StabilityIssue) -> bool:
    """Return True if two issues are described together."""
    return issue.issue_type == other.issue_type and group_of(issue) == group_of(other)
