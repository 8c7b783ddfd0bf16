"""Locations of alarms, and the order in which their symptoms are treated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import StabilityIssue
from stabmon.rules.base import rule_of, symptom_of
from stabmon.rules.symptoms import Symptom

Key = tuple[str, str | None, int | None]
"""(symptom, layer, head): a location at which interventions are tried and judged."""

RENAMED = {"drive": "sustained_growth"}
"""Symptoms by their names in stored states of earlier versions."""


def key_of(issue: StabilityIssue, symptom: Symptom) -> Key:
    """Return the key of an issue; that of the run for a symptom without location."""
    if symptom.per_location:
        return symptom.name, issue.layer, issue.head
    return symptom.name, None, None


def keys_of(issues: Iterable[StabilityIssue]) -> tuple[Key, ...]:
    """Return the keys of issues that have a symptom, each once."""
    found = ((issue, symptom_of(issue)) for issue in issues)
    return tuple(dict.fromkeys(key_of(issue, each) for issue, each in found if each is not None))


def treated_in_order(symptoms: Iterable[Symptom]) -> list[Symptom]:
    """Return open symptoms in the order in which they are treated."""
    ordered: list[Symptom] = []
    found = {each.name: each for each in sorted(symptoms, key=lambda each: each.order)}
    for symptom in found.values():
        promoted = [found[name] for name in symptom.promotes if name in found]
        ordered += [each for each in (symptom, *promoted) if each not in ordered]
    return ordered


def promoted_among(symptoms: Iterable[Symptom]) -> set[str]:
    """Return the names of symptoms that another open one promotes."""
    return {name for each in symptoms for name in each.promotes}


def alarms_now(
    open_issues: Sequence[StabilityIssue], run: TrainingRun
) -> list[tuple[StabilityIssue, Symptom]]:
    """Return the open alarms that have a symptom and are not recovering by themselves."""
    alarms = [(issue, symptom_of(issue)) for issue in open_issues if issue.is_alarm]
    return [
        (issue, symptom)
        for issue, symptom in alarms
        if symptom is not None and not _is_recovering(issue, run)
    ]


def without_symptom(open_issues: Sequence[StabilityIssue]) -> list[StabilityIssue]:
    """Return the open alarms whose rule declares no symptom."""
    return [issue for issue in open_issues if issue.is_alarm and symptom_of(issue) is None]


def may_ruin(issue: StabilityIssue) -> bool:
    """Return whether a run with this issue open may be on its way to diverge.

    An alarm is a sign of it, and so is any issue of a symptom that threatens the run.
    """
    symptom = symptom_of(issue)
    return issue.is_alarm or (symptom is not None and symptom.threatens_run)


def _is_recovering(issue: StabilityIssue, run: TrainingRun) -> bool:
    rule = rule_of(issue.issue_type)
    check = getattr(rule, "is_recovering", None)
    return check is not None and bool(check(issue, run.history))
