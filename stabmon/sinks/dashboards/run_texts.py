"""Issues, incidents and interventions of a run as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from stabmon.incidents import Incident, intervention_text
from stabmon.records import SEVERITIES, StabilityIssue
from stabmon.sinks.issue_table import numbers_in_words

_LONGEST = 400_000
"""Characters of a story; the oldest issues beyond are counted."""
_SMALL = 20_000
"""Characters up to which a story is written at each change, beyond at each tenth more."""


def step_text(issues: Iterable[StabilityIssue], incidents: Sequence[Incident]) -> str:
    """Return one text of a step: its incidents in words, then each issue, the worst first.

    Advice is given once: with the incidents, or with the first issue that has it.

    Args:
        issues: every issue of the step.
        incidents: the incidents that changed at the step.
    """
    parts = [_incident(each) for each in incidents]
    given: set[str] = set()
    for issue in worst_first(issues):
        advice = "" if incidents or issue.suggestion in given else f" {issue.suggestion}"
        given.add(issue.suggestion)
        parts.append(
            f"**{issue.severity}**, {issue.state}: {issue.issue_type}, {issue.where}, "
            f"{numbers_in_words(issue)}.{advice}"
        )
    return "\n\n".join(parts)


def worst_first(issues: Iterable[StabilityIssue]) -> list[StabilityIssue]:
    """Return issues ordered by severity."""
    return sorted(issues, key=lambda issue: -SEVERITIES.index(issue.severity))


def intervention_line(record: Mapping[str, Any]) -> str:
    """Return an audit record as one line."""
    return f"**intervention** at step {record.get('step')}: {intervention_text(record)}"


class RunStory:
    """The whole run so far as one text, for dashboards that keep a sample of the texts.

    TensorBoard keeps the newest text of a tag, but of the others at most 10 or 100 at random.
    """

    def __init__(self) -> None:
        self._incidents: dict[int, Incident] = {}
        self._issues: list[str] = []
        self._interventions: list[str] = []
        self._changed = False
        self._written = 0

    def add_issues(self, issues: Iterable[StabilityIssue]) -> None:
        """Add the issues of a step."""
        self._issues += _lines_of(issues)
        self._changed = True

    def add_incidents(self, incidents: Iterable[Incident]) -> None:
        """Add the incidents that changed at a step."""
        self._incidents |= {each.number: each for each in incidents}
        self._changed = True

    def add_intervention(self, record: Mapping[str, Any]) -> None:
        """Add an audit record."""
        self._interventions.append(f"- {intervention_line(record)}")
        self._changed = True

    def due(self, *, last_call: bool = False) -> str:
        """Return the text where it is worth writing again, else an empty one.

        Args:
            last_call: no other chance will come.
        """
        if not self._changed:
            return ""
        text = self._text()
        if not last_call and self._written > _SMALL and len(text) < 1.1 * self._written:
            return ""
        self._changed, self._written = False, len(text)
        return text

    def _text(self) -> str:
        newest = sorted(
            self._incidents.values(), key=lambda each: (each.state == "closed", -each.step)
        )
        incidents = [f"- **{_state(each)}**: {each.text()}" for each in newest]
        issues, length = self._issues[::-1], 0
        for count, line in enumerate(issues):
            length += len(line)
            if length > _LONGEST:
                issues[count:] = [f"- and {len(issues) - count} earlier lines: see issues.jsonl"]
                break
        chapters = {
            "Incidents, open ones first": incidents,
            "Interventions, newest first": self._interventions[::-1],
            "Every issue, newest first": issues,
        }
        return "\n\n".join(
            f"### {title}\n\n" + "\n".join(lines) for title, lines in chapters.items() if lines
        )


def _lines_of(issues: Iterable[StabilityIssue]) -> list[str]:
    """Return one line for the heads of a layer with the same issue at the same step."""
    of_place: dict[tuple[Any, ...], list[StabilityIssue]] = {}
    for issue in reversed(worst_first(issues)):  # the story turns the lines round
        key = (issue.step, issue.severity, issue.state, issue.issue_type, issue.layer)
        of_place.setdefault(key, []).append(issue)
    return [
        f"- step {step}, **{severity}**, {state}: {name}, {_where(layer, found)}"
        for (step, severity, state, name, layer), found in of_place.items()
    ]


def _where(layer: str | None, issues: Sequence[StabilityIssue]) -> str:
    """Return a layer and its heads."""
    heads = sorted(issue.head for issue in issues if issue.head is not None)
    if not heads:
        return layer or "run"
    return f"{layer or 'run'} head{'s' if len(heads) > 1 else ''} {_ranges(heads)}"


def _ranges(numbers: Iterable[int]) -> str:
    """Return growing numbers with runs joined.

    >>> _ranges([0, 2, 3, 4, 7])
    '0, 2–4, 7'
    """
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        runs.append(f"{found[0]}–{found[-1]}" if len(found) > 1 else f"{found[0]}")
    return ", ".join(runs)


def _state(incident: Incident) -> str:
    if incident.state == "closed":
        return f"closed at step {incident.step}, open from {incident.first_step}"
    return f"{incident.severity}, open since step {incident.first_step}"


def _incident(incident: Incident) -> str:
    """Return an incident with its advice."""
    code = "".join(f"\n    {line}" for line in incident.code.splitlines())
    parts = [f"**{incident.severity}**, {incident.state}: {incident.text()}"]
    if incident.advises and incident.state != "closed":
        parts += filter(None, (f"To do: {incident.advice}" if incident.advice else "", code))
    return "\n\n".join(parts)
