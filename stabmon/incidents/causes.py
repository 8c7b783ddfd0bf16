"""Order of issues from causes to effects."""

from __future__ import annotations

from typing import Any

from stabmon.records import StabilityIssue
from stabmon.rules.base import rule_of, symptom_of

NO_SYMPTOM = 100
"""Place in the causal chain of issues whose rule declares no symptom."""
Kind = tuple[bool, tuple[int, str], str]
"""Kind of an issue: True for an alarm, its group, its type."""


def group_of(issue: StabilityIssue) -> tuple[int, str]:
    """Return the place of an issue in the causal chain, and the name of its symptom."""
    symptom = symptom_of(issue)
    if symptom is None:
        return NO_SYMPTOM, issue.issue_type
    return symptom.causal_order, symptom.name


def rank_as_cause(issue: StabilityIssue) -> tuple[Any, ...]:
    """Return the order in which issues stand for the cause of an incident, the first least."""
    found = rule_of(issue.issue_type)
    order, _ = group_of(issue)
    return (not issue.is_alarm, order, getattr(found, "cause_rank", 50), issue.issue_type)


def kind_of(issue: StabilityIssue) -> Kind:
    """Return whether an issue is an alarm, its group and its type."""
    return issue.is_alarm, group_of(issue), issue.issue_type


def is_like(issue: StabilityIssue, other: StabilityIssue) -> bool:
    """Return True if two issues are described together."""
    return issue.issue_type == other.issue_type and group_of(issue) == group_of(other)
