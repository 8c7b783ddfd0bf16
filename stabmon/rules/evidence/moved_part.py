"""Find the part of a model that moves furthest beyond its own past."""

from __future__ import annotations

import math

import numpy as np

from stabmon.rules.tracking.history import History

PAST = 22
"""Readings in the past of a part's relative update."""
NEWEST = 3
"""Newest readings of which the largest update counts: a part may begin to move just before."""
BEYOND = 10.0
"""Times its usual update from which a part stands out.

In healthy runs the largest of three readings came to 8 times the median of the past, where a small
model begins to copy.
"""


def moved_part(history: History) -> dict[str, str | float]:
    """Return the part whose steps exceed their past most, for an issue's evidence.

    Args:
        history: the readings so far.

    Returns:
        ``part_moved_most`` and ``times_usual_update``; empty where no part stands out.

    Example:
        >>> from stabmon.records import PartChange, Reading
        >>> history = History()
        >>> for step in range(1, 12):
        ...     moved = {"embed": 0.01, "head": 0.5 if step > 9 else 0.02}
        ...     parts = {name: PartChange(1.0, 1.0, update) for name, update in moved.items()}
        ...     history.add(Reading(step, None, {}, parts=parts))
        >>> moved_part(history)
        {'part_moved_most': 'head', 'times_usual_update': 25.0}
    """
    found: dict[str, float] = {}
    for part in history.latest.parts:
        updates = np.array(
            [r.parts[part].update for r in history.readings[-PAST:] if part in r.parts]
        )
        updates = updates[np.isfinite(updates)]
        usual = float(np.median(updates[:-NEWEST])) if len(updates) >= 3 * NEWEST else math.nan
        if usual > 0:
            found[part] = float(updates[-NEWEST:].max() / usual)
    most = max(found, key=lambda part: found[part], default="")
    if found.get(most, 0.0) < BEYOND:
        return {}
    return {"part_moved_most": most, "times_usual_update": round(found[most], 2)}
