"""Chance that attention damages a run from here on, by its open issues."""

from __future__ import annotations

from collections.abc import Iterable

from stabmon.records import Severity, StabilityIssue

RISKS: dict[Severity | None, float] = {
    None: 0.05,
    "info": 0.05,
    "warning": 0.2,
    "error": 0.83,
    "critical": 0.95,
}
"""Share of runs that end worse than their paired healthy run, by the worst open severity.

Of 80 small runs of the table in the README that no level was set on, 18 of the 21 with an alarm and
2 of the 59 without one failed; with one run added to either side. ``warning`` and ``critical`` are
not measured and lie between and beyond.
"""


def risk_of(open_issues: Iterable[StabilityIssue], layer: str | None = None) -> float:
    """Return the chance that attention damages the run from here on.

    Args:
        open_issues: every issue that is open.
        layer: count only the issues of this layer; None for all.

    Returns:
        In [0, 1].

    Example:
        >>> issue = StabilityIssue(40, "h.0", 2, "logit_growth", "error", 90.0, 48.0, "")
        >>> risk_of([]), risk_of([issue]), risk_of([issue], layer="h.1")
        (0.05, 0.83, 0.05)
    """
    counted = (each for each in open_issues if layer is None or each.layer == layer)
    return max((RISKS[each.severity] for each in counted), default=RISKS[None])
