"""Issues as rows of a bounded table, and their numbers in words."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from stabmon.incidents import intervention_text
from stabmon.incidents.wording import closing_numbers, describe, forecast_text
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
AUDIT_COLUMNS = ("step", "intervention", "action", "layer", "head", "why", "in words")
"""Columns of a table of interventions."""


def numbers_in_words(issue: StabilityIssue) -> str:
    """Return an issue's quantities by name, each with its past, and the forecast."""
    if issue.state == "closed":
        return closing_numbers(issue)
    forecast = forecast_text([issue])
    numbers = describe([issue], "loop").numbers
    return f"{numbers}. {forecast}" if forecast else numbers


class RecentRows:
    """Bounded table of the newest rows, for destinations where an upload is costly.

    Args:
        seconds: least wall time between two publications.
        keep: rows kept; the oldest go first (the records have them all).
    """

    def __init__(self, seconds: float, keep: int = 1000) -> None:
        self._seconds = seconds
        self._rows: deque[list[Any]] = deque(maxlen=keep)
        self._fresh = False
        self._published = -float("inf")

    def add_row(self, row: list[Any]) -> None:
        """Add one row."""
        self._rows.append(row)
        self._fresh = True

    def due(self, *, last_call: bool = False) -> bool:
        """Return whether a publication is due.

        Args:
            last_call: no other chance will come, so that the wall time does not count.
        """
        return self._fresh and (last_call or time.monotonic() - self._published >= self._seconds)

    def publish(self) -> list[list[Any]]:
        """Return the rows, oldest first, and note that they are published."""
        self._fresh = False
        self._published = time.monotonic()
        return list(self._rows)


class RecentIssues(RecentRows):
    """Bounded table of the newest issues, with the columns :data:`COLUMNS`."""

    def add(self, issue: StabilityIssue) -> None:
        """Add one issue."""
        self.add_row([getattr(issue, column) for column in COLUMNS])


class RecentInterventions(RecentRows):
    """Bounded table of the newest audit records, with the columns :data:`AUDIT_COLUMNS`."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one audit record."""
        self.add_row([*(record.get(key) for key in AUDIT_COLUMNS[:-1]), intervention_text(record)])
