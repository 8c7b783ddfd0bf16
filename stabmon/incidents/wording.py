"""Words for the issues of one incident."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stabmon.records import SEVERITIES, StabilityIssue, counted
from stabmon.rules.base import Rule, rule_of
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, number

SOON = 5
"""Steps below which a forecast gives no number."""


def describe(issues: Sequence[StabilityIssue], framework: str) -> Description:
    """Return the words of the issues' rule; plain ones where it has none or fails.

    Args:
        issues: at least one, all of one type, the worst first.
        framework: ``transformers``, ``lightning`` or ``loop``.
    """
    found = rule_of(issues[0].issue_type)
    try:
        if found is not None and hasattr(found, "describe"):
            return found.describe(issues, framework)
    except Exception:  # evidence of a stored record, or a rule of another package, may be anything
        pass
    return Rule.describe(issues, framework)


def worst_first(issues: Sequence[StabilityIssue]) -> list[StabilityIssue]:
    """Return issues of one type by severity, time until damage and distance from the threshold."""

    def rank(issue: StabilityIssue) -> tuple[float, float, float]:
        eta = math.inf if issue.eta_steps is None else issue.eta_steps
        return (-SEVERITIES.index(issue.severity), eta, -_distance(issue))

    return sorted(issues, key=rank)


def quantity_of(issue_type: str) -> str:
    """Return the name of the value that issues of a type report."""
    found = rule_of(issue_type)
    name = getattr(found, "quantity", "") or getattr(found, "value_of", None) or issue_type
    return str(name).replace("_", " ")


def forecast_text(issues: Sequence[StabilityIssue]) -> str:
    """Return the time until damage of the issue that comes first; empty without a forecast."""
    with_eta = [each for each in issues if each.eta_steps is not None]
    if not with_eta:
        return ""
    first = min(with_eta, key=lambda each: each.eta_steps or 0.0)
    steps = first.eta_steps or 0.0
    if steps < SOON:
        return "Damage is expected within the next few steps"
    interval = first.evidence.get("eta_interval")
    low, high = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (0, 0)
    known_interval = all(isinstance(end, int | float) for end in (low, high)) and low < high
    words = f" ({low:.0f} to {high:.0f})" if known_interval and math.isfinite(high) else ""
    return f"Damage is expected in about {steps:.0f} steps{words}"


def effects_text(
    others: Sequence[StabilityIssue], framework: str, *, begin: str = "With it"
) -> str:
    """Return issues that follow from a cause, counted by type."""
    by_type: dict[str, list[StabilityIssue]] = {}
    for issue in others:
        by_type.setdefault(issue.issue_type, []).append(issue)
    parts = []
    for same in by_type.values():
        title = describe(worst_first(same), framework).title
        layers = {issue.layer for issue in same if issue.layer is not None}
        heads = len({(issue.layer, issue.head) for issue in same if issue.head is not None})
        of = f" of {counted(len(layers), 'layer')}" if len(layers) > 1 else ""
        place = (
            f" in {counted(heads, 'head')}{of}"
            if heads
            else (f" in {counted(len(layers), 'layer')}" if layers else "")
        )
        parts.append(title + place)
    return f"{begin}: {', '.join(parts)}" if parts else ""


def closing_numbers(issue: StabilityIssue) -> str:
    """Return the value at which an issue closed, its worst and how long it was open."""
    worst = known(issue.evidence, "worst_value")
    opened = known(issue.evidence, "opened_at")
    words = f"{quantity_of(issue.issue_type)} {number(issue.value)} now"
    if worst is not None and worst != issue.value:
        words += f", {number(worst)} at worst"
    return words if opened is None else words + f"; open for {issue.step - opened:.0f} steps"


def _distance(issue: StabilityIssue) -> float:
    value, level = issue.value, issue.threshold
    if not (math.isfinite(value) and math.isfinite(level)):
        return math.inf
    if value > 0 and level > 0:
        return abs(math.log(value / level))
    return abs(value - level)
