"""An open incident: its issues, its cause, and what was said of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from stabmon.incidents.causes import Kind, group_of, is_like, kind_of, rank_as_cause
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

SPREAD = 4
"""Growth of the number of layers that is reported again."""
FARTHER = 10.0
"""Growth of the value's ratio to its threshold that is reported again."""
Key = tuple[str, str | None, int | None]


def explains(incident: OpenIncident, issue: StabilityIssue) -> bool:
    """Return True if an issue belongs to an incident, as its like or as its effect.

    Once the cause of an incident is over, only that cause again and more of what it left open
    belong to it.
    """
    group = group_of(issue)
    if incident.group == group:
        return True
    if not incident.cause_is_open:
        return incident.holds(group)
    found = rule_of(issue.issue_type)
    if found is not None and getattr(found, "has_own_cause", lambda _: False)(issue):
        return False
    return incident.is_alarm and incident.order < group[0]


class OpenIncident:
    """Issues that have one cause, from the first that opened to the last that closes.

    The cause is the most fundamental alarm that was found, and stays so when it closes before what
    follows from it.

    Args:
        number: of the incident in the run.
        issue: the first.
    """

    def __init__(self, number: int, issue: StabilityIssue) -> None:
        self.number, self.first_step = number, issue.step
        self.issues: dict[Key, StabilityIssue] = {}
        """The open ones, as last emitted."""
        self.layers: dict[str, None] = {}
        self.heads: set[tuple[str | None, int]] = set()
        self.changed: list[StabilityIssue] = []
        """Issues of the present step."""
        self._cause = issue
        """An issue of the cause, as last emitted."""
        self._over_since: int | None = None
        """Step at which the last issue of the cause closed."""
        self._kinds: Counter[Kind] = Counter()
        """Open issues of each kind, so that hundreds of heads are not gone through at each."""
        self._announced: Incident | None = None
        """Change against which others are news."""
        self._announced_distance = 1.0
        self._muted = False
        """That change was not shown: the same cause has come too often."""
        self._alarmed = False

    @property
    def group(self) -> tuple[int, str]:
        """Place in the causal chain, and symptom, of its cause."""
        return group_of(self._cause)

    @property
    def order(self) -> int:
        """Place of its cause in the causal chain."""
        return self.group[0]

    @property
    def is_alarm(self) -> bool:
        """True while an issue of severity error or above is open."""
        return any(alarm for alarm, _, _ in self._kinds)

    @property
    def cause_is_open(self) -> bool:
        """True while an issue of the cause is open."""
        return self._over_since is None

    @property
    def explains_earlier(self) -> bool:
        """True if its cause was at work before it was found."""
        symptom = symptom_of(self._cause)
        return self.cause_is_open and symptom is not None and symptom.explains_earlier

    def holds(self, group: tuple[int, str]) -> bool:
        """Return whether an issue of a symptom is open."""
        return any(each == group for _, each, _ in self._kinds)

    def start_step(self) -> None:
        """Begin a step without a change."""
        self.changed = []

    def add(self, issue: StabilityIssue) -> None:
        """Add an issue that opened or worsened."""
        self._uncount(self.issues.get(issue.key))
        self.issues[issue.key] = issue
        self._kinds[kind_of(issue)] += 1
        self.changed.append(issue)
        self._alarmed |= issue.is_alarm
        self._update_cause(issue)
        if issue.layer is not None:
            self.layers.setdefault(issue.layer)
        if issue.head is not None:
            self.heads.add((issue.layer, issue.head))

    def close_issue(self, issue: StabilityIssue) -> None:
        """Take an issue out that closed."""
        self._uncount(self.issues.pop(issue.key))
        self.changed.append(issue)
        cause = kind_of(self._cause)[1:]
        if self.cause_is_open and not any(kind[1:] == cause for kind in self._kinds):
            self._over_since = issue.step

    def _uncount(self, issue: StabilityIssue | None) -> None:
        """Take an issue that is open no longer, or has changed, out of the counts."""
        if issue is not None:
            kind = kind_of(issue)
            self._kinds[kind] -= 1
            if not self._kinds[kind]:
                del self._kinds[kind]

    def _update_cause(self, issue: StabilityIssue) -> None:
        """Let an issue stand for the cause, if it is of it or more fundamental."""
        if is_like(issue, self._cause) or rank_as_cause(issue) < rank_as_cause(self._cause):
            self._cause, self._over_since = issue, None

    def follows_from_it(self, other: OpenIncident) -> bool:
        """Return True if another incident follows from this one."""
        return other is not self and other.order > self.order and explains(self, other._cause)

    def absorb(self, other: OpenIncident) -> None:
        """Take over an incident that follows from this one."""
        self.number = min(self.number, other.number)
        self.first_step = min(self.first_step, other.first_step)
        self.issues = {**other.issues, **self.issues}
        self._kinds = Counter(map(kind_of, self.issues.values()))
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
        same = worst_first([each for each in self.issues.values() if self._is_of_cause(each)])
        others = [each for each in self.issues.values() if not self._is_of_cause(each)]
        if same:
            words, where = describe(same, framework), locate(same)
        else:
            words = describe([self._cause], framework)
            words = replace(words, numbers=f"over since step {self._over_since}")
            where = locate([self._cause]) if before is None else before.where
        return self._record(
            step,
            cause=self._cause.issue_type,
            state="opened" if before is None else "worsened",
            severity=self._severity(),
            title=words.title,
            where=where,
            numbers=words.numbers,
            effects=effects_text(others, framework, begin="With it" if same else "Still open"),
            forecast=forecast_text(same or others),
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
        return said is None or self.has_new_cause() or rank(self._severity()) > rank(said.severity)

    def has_new_cause(self) -> bool:
        """Return whether an open incident was not reported with its present cause."""
        return self._announced is None or self._announced.cause != self._cause.issue_type

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

    def _is_of_cause(self, issue: StabilityIssue) -> bool:
        return is_like(issue, self._cause)

    def _severity(self) -> Severity:
        """Return the worst severity of the open issues."""
        return max((each.severity for each in self.issues.values()), key=SEVERITIES.index)

    def _distance(self) -> float:
        """Return the largest ratio of value and threshold of the cause's issues, at least 1."""
        return max(map(_ratio, filter(self._is_of_cause, self.issues.values())), default=1.0)


def _ratio(issue: StabilityIssue) -> float:
    """Return the ratio of an issue's value and threshold, at least 1."""
    value, level = issue.value, issue.threshold
    if not (math.isfinite(value) and math.isfinite(level) and value > 0 and level > 0):
        return 1.0
    return max(value / level, level / value)
