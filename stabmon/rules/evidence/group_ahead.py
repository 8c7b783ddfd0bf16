"""Evidence that the parameter group of W_q and W_k alone is too fast, with no past to go by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from stabmon.records import Reading
from stabmon.rules.evidence.step_size import SLACK, name_rates
from stabmon.rules.tracking.history import History

AHEAD = 3.0
"""Times the other groups' rate, and times their relative update, of a group that is too fast.

At the others' rate W_q and W_k move 0.5 to 1 times as far as the median of other groups; at 8 to 100
times it, 4 to 50 times.
"""


@dataclass(frozen=True)
class GroupAhead:
    """A parameter group that moves further than the others, and the rate that fits."""

    times_update: float
    """Its relative update over the median of the other groups."""
    multiple: float
    """Multiple of the other groups' median rate at which it would move as they do."""
    rate: float
    """The rate that it used in the newest step."""
    fitting_rate: float
    """The rate at which it would have moved as the others did."""
    found_at: int
    """The step at which it was ahead for the second time."""


def groups_ahead(history: History) -> dict[str, GroupAhead]:
    """Return the groups of W_q and W_k whose rate makes them move further than all others.

    Twice at least, both the rate used and the relative update were ``AHEAD`` times the other
    groups' median, and the rate is still higher than what fits. The largest but one relative update
    counts: weights that grow under such a rate hide it.

    Args:
        history: the readings so far.
    """
    keys = set(history.latest.query_key_groups)
    others_now = _others(history.latest.used_rates, keys)
    found = {}
    for key in keys:
        seen = sorted(
            (
                (times, rates / times, each.step)
                for each in history.readings
                for times, rates in _times(each, key)
            ),
            reverse=True,
        )
        if len(seen) < 2 or not others_now > 0 or key not in history.latest.used_rates:
            continue
        times, multiple, _ = seen[1]
        rate, fitting = history.latest.used_rates[key], multiple * others_now
        if rate > SLACK * fitting:
            second = sorted(step for *_, step in seen)[1]
            found[key] = GroupAhead(times, multiple, rate, fitting, second)
    return found


def ahead_advice(found: Mapping[str, GroupAhead]) -> str:
    """Return the rate to set, and the evidence for it, in words."""
    worst = max(found.values(), key=lambda each: each.times_update)
    return (
        f"Lower {name_rates(found)}, which holds W_q and W_k, to {worst.fitting_rate:.2g}: at "
        f"{worst.rate:.2g} a step changed {worst.times_update:.0f} times as much of it as of the "
        f"other groups, and heads break. Start again with {worst.multiple:.2g} times the other "
        "groups' rate, or cap it there now (cap_learning_rate)."
    )


def _times(reading: Reading, key: str) -> list[tuple[float, float]]:
    """Return relative update and rate of a group over the others', where both are ahead."""
    keys = {*reading.query_key_groups, key}
    update = reading.updates.get(key, np.nan) / _others(reading.updates, keys)
    rate = reading.used_rates.get(key, np.nan) / _others(reading.used_rates, keys)
    return [(float(update), float(rate))] if update >= AHEAD and rate >= AHEAD else []


def _others(values: Mapping[str, float], keys: Collection[str]) -> float:
    """Return the median over the groups that are not in ``keys``; NaN where none is above 0."""
    known = [value for key, value in values.items() if key not in keys and value > 0]
    return float(np.median(known)) if known else float("nan")
