"""Recovery of a head with an open issue.

An issue closes only well beyond its threshold and some samples later; an intervention on a head
that is on its way there has a cost and repairs nothing. A clipped head sits at twice its old
scores, so at less than its old entropy; half of an entropy's threshold is far from saturated, and
training takes it from there.
"""

from __future__ import annotations

from stabmon.records import StabilityIssue
from stabmon.rules.tracking.history import History


def rose_above(issue: StabilityIssue, history: History, signal: str, *, share: float = 1.0) -> bool:
    """Return True if a head's signal is above a share of the issue's threshold again.

    Args:
        issue: an open issue of one head.
        history: the readings so far.
        signal: name of the signal that fell.
        share: of the threshold; the whole of it where the head was so from the start, since it has
            no better past to come back to.
    """
    value = _newest(issue, history, signal)
    share = 1.0 if issue.evidence.get("from_the_start") else share
    return value is not None and value > share * issue.threshold


def fell_below(issue: StabilityIssue, history: History, signal: str) -> bool:
    """Return True if a head's signal is below the issue's threshold again.

    Args:
        issue: an open issue of one head.
        history: the readings so far.
        signal: name of the signal that grew.
    """
    value = _newest(issue, history, signal)
    return value is not None and value < issue.threshold


def _newest(issue: StabilityIssue, history: History, signal: str) -> float | None:
    """Return the head's newest value of a signal; None where there is none."""
    if issue.head is None or issue.layer not in history.layers:
        return None
    return float(history.now(signal)[history.of_layer(issue.layer)][issue.head])
