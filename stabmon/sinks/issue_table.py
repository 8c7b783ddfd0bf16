"""The newest issues, kept for destinations where each upload of the table costs something."""

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


class RecentIssues:
    """Bounded table of issues that says when it is worth publishing again.

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
        """Take one more issue."""
        self._issues.append(issue)
        self._fresh = True

    def due(self, *, last_call: bool = False) -> bool:
        """Whether there is anything new to publish and, unless this is the ``last_call``, the time
        for it has come.
        """
        return self._fresh and (last_call or time.monotonic() - self._published >= self._seconds)

    def publish(self) -> list[list[Any]]:
        """The rows, in the order of :data:`COLUMNS`, oldest first; they count as published from now
        on.
        """
        self._fresh = False
        self._published = time.monotonic()
        return [[getattr(issue, column) for column in COLUMNS] for issue in self._issues]
