"""Numbers in words: a quantity, its limit, its past and its growth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stabmon.records import StabilityIssue

NO_LIMIT = 1e30
"""Threshold from which no limit is shown: float32's largest number is none to a reader."""


def number(value: float) -> str:
    """Return a number in up to three digits: ``0.031``, ``10.9``, ``1.2e+05``, ``infinite``.

    Example:
        >>> number(10.947), number(0.00000312), number(float("inf"))
        ('10.9', '3.12e-06', 'infinite')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return f"{value:.3g}"


def share(value: float) -> str:
    """Return a share in per cent, with a digit after the point below ten.

    Example:
        >>> share(0.0123), share(0.5)
        ('1.2%', '50%')
    """
    return f"{100 * value:.1f}%" if abs(value) < 0.0995 else f"{100 * value:.0f}%"


def with_limit(name: str, issue: StabilityIssue, limit: str = "limit") -> str:
    """Return a quantity with its limit, where a finite one says something.

    Args:
        name: name of the quantity.
        issue: its value and threshold.
        limit: word for the threshold.

    Example:
        >>> with_limit("loss", StabilityIssue(9, None, None, "loss_spike", "error", 5.0, 2.2, ""))
        'loss 5 (limit 2.2)'
    """
    shown = math.isfinite(issue.threshold) and abs(issue.threshold) < NO_LIMIT
    words = f" ({limit} {number(issue.threshold)})" if shown else ""
    return f"{name} {number(issue.value)}{words}"


def past(evidence: Mapping[str, Any]) -> str:
    """Return the past of an issue's value: ``, was 2.1 at step 110``; empty where unknown.

    Args:
        evidence: the issue's, with ``value_before`` and ``step_before``.
    """
    before, step = known(evidence, "value_before"), known(evidence, "step_before")
    return "" if before is None or step is None else f", was {number(before)} at step {step:.0f}"


def growth(evidence: Mapping[str, Any], *, usual: str = "training makes it grow") -> str:
    """Return the growth since then beside the usual one; empty where either says little.

    Args:
        evidence: the issue's, with ``growth_per_step`` and ``usual_growth_per_step``.
        usual: words before the usual growth.
    """
    now, before = known(evidence, "growth_per_step"), known(evidence, "usual_growth_per_step")
    if now is None or now < 0.0005:
        return ""
    if before is None or before >= 0.5 * now:
        return f"; it grew {share(now)} a step since"
    if before < 0.0005:
        return f"; it grew {share(now)} a step since, and hardly at all before"
    return f"; {usual} {share(before)} a step, this grew {share(now)}"


def known(evidence: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of the evidence; None where it is missing or not one."""
    value = evidence.get(key)
    good = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if good and value is not None else None
