"""Duration of issues and incidents, and the interventions in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabmon.incidents import Incident, is_armed
from stabmon.records import SEVERITIES, Severity, StabilityIssue
from stabmon.report.run.loading import Run

APPLIED = ("applied", "skipped")
"""Actions of audit records by which an intervention changed the run."""


@dataclass(frozen=True)
class IssueSpan:
    """One issue from its opening to its closing."""

    issue: StabilityIssue
    """As it opened."""
    severity: Severity
    """The worst it had."""
    end: int | None
    """Step of its closing; None while it is open."""


def issue_spans(issues: Sequence[StabilityIssue]) -> list[IssueSpan]:
    """Join the openings, worsenings and closings of a run's issues.

    Args:
        issues: in the order of steps.

    Returns:
        One span for each opening, in their order.
    """
    spans: list[IssueSpan] = []
    open_at: dict[tuple[str, str | None, int | None], int] = {}
    for issue in issues:
        at = open_at.get(issue.key)
        if issue.state == "closed":
            if at is not None:
                spans[at] = IssueSpan(spans[at].issue, spans[at].severity, issue.step)
                del open_at[issue.key]
        elif at is None:
            open_at[issue.key] = len(spans)
            spans.append(IssueSpan(issue, issue.severity, None))
        else:
            worst = max(spans[at].severity, issue.severity, key=SEVERITIES.index)
            spans[at] = IssueSpan(spans[at].issue, worst, None)
    return spans


@dataclass(frozen=True)
class IncidentSpan:
    """One incident from its opening to its closing."""

    incident: Incident
    """Its newest change that did not close it."""
    severity: Severity
    """The worst it had."""
    parts: tuple[tuple[int, Severity], ...]
    """Step from which each severity holds."""
    start: int
    end: int | None
    """Step of its closing; None while it is open."""

    @property
    def is_alarm(self) -> bool:
        """True if it was ever of severity error or above."""
        return SEVERITIES.index(self.severity) >= SEVERITIES.index("error")


def incident_spans(run: Run) -> list[IncidentSpan]:
    """Return the incidents of a run, alarms first, then in the order of their opening."""
    found = []
    for newest in run.incidents:
        changes = run.of(newest.number)
        lasting = [each for each in changes if each.state != "closed"] or changes
        parts = tuple((each.step, each.severity) for each in lasting)
        worst = max((severity for _, severity in parts), key=SEVERITIES.index)
        end = None if run.is_open(newest) else newest.step
        found.append(IncidentSpan(lasting[-1], worst, parts, newest.first_step, end))
    return sorted(found, key=lambda each: (not each.is_alarm, each.start))


def interventions_between(run: Run, first: float, last: float) -> list[Mapping[str, Any]]:
    """Return the audit records of changes of the run from one step to another.

    Args:
        run: the run.
        first: first step.
        last: last step.
    """
    return [
        record
        for record in run.records.interventions
        if record.get("action") in APPLIED
        and not is_armed(record)
        and first <= record.get("step", 0) <= last
    ]
