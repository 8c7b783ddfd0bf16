"""Issues as rows of a bounded table, and their numbers in words."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from stabmon.records import StabilityIssue

COLUMNS = (
    "step",
    "state",
    "severity",
    "issue_type",
    "layer",
    "head",
    "value",
    "threshold",
    "eta_steps",
    "suggestion",
)


def numbers_in_words(issue: StabilityIssue) -> str:
    """Return ``value 0.03 (limit 0.1)``, with the time until damage in a forecast."""
    eta = "" if issue.eta_steps is None else f", damage in about {issue.eta_steps:.0f} steps"
    return f"value {issue.value:.4g} (limit {issue.threshold:.4g}{eta})"


class RecentIssues:
    """Bounded table of the newest issues, for destinations where an upload is costly.

    Args:
        seconds: least wall time between two publications.
        keep: rows kept; the oldest go first (issues.jsonl has them all).
    """

    def __init__(self, seconds: float, keep: int = 1000) -> None:
        self._seconds = seconds
        self._issues: deque[StabilityIssue] = deque(maxlen=keep)
        self._fresh = False
        self._published = -float("inf")

    def add(self, issue: StabilityIssue) -> None:
        """Add one issue."""
        self._issues.append(issue)
        self._fresh = True

    def due(self, *, last_call: bool = False) -> bool:
        """Return whether a publication is due.

        Args:
            last_call: no other chance will come, so that the wall time does not count.
        """
        return self._fresh and (last_call or time.monotonic() - self._published >= self._seconds)

    def publish(self) -> list[list[Any]]:
        """Return the rows and note that they are published.

        Returns:
            The values of :data:`COLUMNS`, oldest issue first.
        """
        self._fresh = False
        self._published = time.monotonic()
        return [[getattr(issue, column) for column in COLUMNS] for issue in self._issues]
