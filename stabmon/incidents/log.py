"""Group the issues of a run into incidents, live and from stored records alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from stabmon.incidents.causes import group_of
from stabmon.incidents.incident import Incident
from stabmon.incidents.open_incident import OpenIncident, explains
from stabmon.records import StabilityIssue

MOST_ALERTS = 3
"""Alerts of one cause in a run."""


class IncidentLog:
    """The incidents of a run, from the stream of its issues and nothing else.

    Issues of one symptom are one incident, over all layers and heads. An issue joins an incident
    that explains it: one of an alarm that comes before it in the chain from causes to effects. A
    cause that is found later, and was at work before, takes over the incidents that it explains. A
    cause that closes before its effects stays the incident's cause, and explains nothing new. An
    incident closes with its last issue.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``, for advice and code.

    Example:
        >>> log = IncidentLog()
        >>> scores = StabilityIssue(40, "h.0", 2, "logit_growth", "error", 90.0, 48.0, "")
        >>> rate = StabilityIssue(50, None, None, "update_spike", "error", 0.03, 0.001, "")
        >>> [each.cause for each in log.update([scores])], log.open[0].number
        (['logit_growth'], 1)
        >>> change, = log.update([rate])
        >>> change.cause, change.number, change.effects
        ('update_spike', 1, 'With it: attention scores grow in 1 head')
    """

    def __init__(self, framework: str = "loop") -> None:
        self._framework = framework
        self._open: list[OpenIncident] = []
        self._newest: dict[int, Incident] = {}
        self._opened: Counter[str] = Counter()
        self._alerts: Counter[str] = Counter()
        self._count = 0

    @property
    def open(self) -> tuple[Incident, ...]:
        """Newest change of each open incident, alarms first, then causes first."""
        return tuple(self._newest[each.number] for each in sorted(self._open, key=_importance))

    @property
    def all(self) -> tuple[Incident, ...]:
        """Newest change of each incident of the run, in the order of their numbers."""
        return tuple(self._newest[number] for number in sorted(self._newest))

    def update(self, issues: Sequence[StabilityIssue]) -> list[Incident]:
        """Take the issues of one step.

        Args:
            issues: all issues that opened, worsened or closed at the step.

        Returns:
            The incidents that changed, alarms first, then causes first.
        """
        if not issues:
            return []
        for each in self._open:
            each.start_step()
        for issue in sorted((i for i in issues if i.state != "closed"), key=group_of):
            self._assign(issue)
        self._let_causes_take_over()
        for issue in issues:
            holder = self._holder(issue)
            if issue.state == "closed" and holder is not None:
                holder.close_issue(issue)
        changed = sorted((each for each in self._open if each.changed), key=_importance)
        self._open = [each for each in self._open if each.issues]
        return [self._record(each, issues[0].step) for each in changed]

    def _assign(self, issue: StabilityIssue) -> None:
        """Give an issue to the incident that has it or explains it, or to a new one."""
        holder = self._holder(issue) or next(
            (each for each in sorted(self._open, key=_importance) if explains(each, issue)), None
        )
        if holder is None:
            self._count += 1
            holder = OpenIncident(self._count, issue)
            self._open.append(holder)
        holder.add(issue)

    def _let_causes_take_over(self) -> None:
        """Merge incidents into one whose cause was at work before they opened."""
        for cause in sorted(self._open, key=_importance):
            if cause not in self._open or not (cause.is_alarm and cause.explains_earlier):
                continue
            for each in [other for other in self._open if cause.follows_from_it(other)]:
                self._open.remove(each)
                # the merged incident has the older number
                self._newest.pop(max(cause.number, each.number), None)
                cause.absorb(each)

    def _holder(self, issue: StabilityIssue) -> OpenIncident | None:
        return next((each for each in self._open if issue.key in each.issues), None)

    def _record(self, incident: OpenIncident, step: int) -> Incident:
        """Return the change as a record, and decide whether it is worth a line and an alert."""
        before = self._newest.get(incident.number)
        found = incident.describe(step, self._framework, before)
        is_news, is_open = incident.is_news(), found.state != "closed"
        is_graver = is_open and incident.is_graver()
        repeats = is_news and is_open and incident.has_new_cause() and self._repeats(found.cause)
        news = is_news and not repeats
        alerts = news and is_graver and self._alerts[found.cause] < MOST_ALERTS
        self._alerts[found.cause] += alerts
        if is_news:
            incident.note_announced(found, muted=not news)
        is_new = before is None or before.advice != found.advice or not before.advises
        found = replace(found, announced=news, alerts=alerts, advises=news and is_open and is_new)
        self._newest[incident.number] = replace(
            found, advises=found.advises or bool(before and before.advises)
        )
        return found

    def _repeats(self, cause: str) -> bool:
        """Count an alarm of a cause; return whether it is not its 1st, 2nd, 4th, 8th … one."""
        self._opened[cause] += 1
        times = self._opened[cause]
        return times & (times - 1) != 0


def incidents_of(issues: Iterable[StabilityIssue], framework: str = "loop") -> list[Incident]:
    """Return every change of every incident of a run.

    Args:
        issues: the issues of one run in the order of steps, as stored.
        framework: ``transformers``, ``lightning`` or ``loop``, for advice and code.

    Returns:
        The changes in order; the newest of each number is how the incident stands.

    Example:
        >>> issue = StabilityIssue(40, "h.0", 2, "logit_growth", "error", 90.0, 48.0, "")
        >>> [each.title for each in incidents_of([issue])]
        ['attention scores grow']
    """
    log, changes = IncidentLog(framework), []
    for _, of_step in groupby(issues, key=lambda issue: issue.step):
        changes += log.update(list(of_step))
    return changes


def _importance(incident: OpenIncident) -> tuple[bool, int, int]:
    return (not incident.is_alarm, incident.order, incident.number)
