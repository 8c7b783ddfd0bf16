"""Incidents as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from stabmon._display.html import table
from stabmon.incidents.incident import Incident


def incident_table(incidents: Sequence[Incident]) -> str:
    """Return a table of incidents, one a row; nothing without one.

    Args:
        incidents: the incidents, in the order to show.

    Example:
        >>> incident_table([])
        ''
    """
    rows = [
        (
            each.severity if each.state != "closed" else "closed",
            each.headline,
            each.numbers,
            f"step {each.first_step}",
            each.forecast,
        )
        for each in incidents
    ]
    return table(("", "incident", "numbers", "since", "forecast"), rows)
