"""Past of the value that an issue reports, for readers."""

from __future__ import annotations

import math

import numpy as np

from stabmon.records import StabilityIssue
from stabmon.rules.tracking.history import History

PAST = 40
"""Newest readings among which the value's departure is looked for."""
BEGUN = 0.2
"""Share of the departure up to which a reading counts as before it."""


def own_past(history: History, issue: StabilityIssue, signal: str) -> dict[str, float]:
    """Return the last value of a signal before it departed, and its growth before and since.

    Args:
        history: the readings so far; the newest is the issue's.
        issue: its layer and head are the place.
        signal: name of the signal.

    Returns:
        ``value_before`` and ``step_before``, at the newest reading that is within a fifth of the
        departure from the past's median; for positive values ``growth_per_step`` since then and
        ``usual_growth_per_step`` from the first reading to it, as shares. Empty where less than two
        readings have a value, or nothing departed.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step, score in ((10, 2.0), (20, 2.1), (30, 2.0), (40, 6.0)):
        ...     history.add(Reading(step, None, {"attn": {"max_logit": np.array([score])}}))
        >>> issue = StabilityIssue(40, "attn", 0, "logit_growth", "error", 6.0, 4.0, "")
        >>> own_past(history, issue, "max_logit")["step_before"]
        30.0
    """
    values, steps = history.series(signal, issue)[-PAST:], history.steps[-PAST:]
    known = np.isfinite(values)
    if known.sum() < 2 or not known[-1]:
        return {}
    values, steps = values[known], steps[known]
    now, middle = values[-1], float(np.median(values[:-1]))
    if now == middle:
        return {}
    near = np.flatnonzero((values[:-1] - middle) / (now - middle) <= BEGUN)
    if not len(near):
        return {}
    at = int(near[-1])
    found = {"value_before": float(values[at]), "step_before": float(steps[at])}
    if (values > 0).all():
        found["growth_per_step"] = _rate(values[at], now, steps[at], steps[-1])
        found["usual_growth_per_step"] = _rate(values[0], values[at], steps[0], steps[at])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _rate(first: float, last: float, start: int, end: int) -> float:
    """Return the relative growth per step; NaN over no step."""
    return float((last / first) ** (1 / (end - start)) - 1) if end > start else math.nan
