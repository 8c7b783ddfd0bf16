"""Find the rate or the scale that was turned up while attention changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stabmon.rules.tracking.history import History

SPAN = 60
"""Optimizer steps over which a rate that rises is the likeliest cause of what attention does now."""
RISING = 1.1
"""Times that a rate has risen over the span where it rises still, as in a ramp that never ends."""
RISE = 1.5
"""Times that a rate or a scale has risen: schedules that fall or stand still never do."""
HIGHEST = 0.9
"""Share of its highest value so far that a rate must have now; else the rise is over."""


@dataclass(frozen=True)
class Driver:
    """A rate or a scale that rose before attention changed."""

    by: Literal["rate", "query_key", "scale"]
    """All groups' rate, that of W_q and W_k alone, or the layer's scale."""
    times: float
    before: float
    now: float
    since: int
    """The step at which it was still ``before``."""
    fits: float
    """The value at which attention was well: of the last reading with scores of half of today's."""

    @property
    def evidence(self) -> dict[str, Any]:
        """Plain values for an issue."""
        return {
            "by": self.by,
            "driver_times": self.times,
            "driver_before": self.before,
            "driver_now": self.now,
            "driver_since": self.since,
            "driver_fits": self.fits,
        }

    @property
    def advice(self) -> str:
        """Return the change that takes the cause away."""
        if self.by == "scale":
            return (
                f"Set the scale of this layer's scores back: it rose {self.times:.3g} times since "
                f"step {self.since}, from {self.before:.3g} to {self.now:.3g}. Until then hold it "
                "(cap_scale)."
            )
        whose = "of W_q and W_k " if self.by == "query_key" else ""
        return (
            f"Lower the learning rate {whose}to {self.fits:.2g}: it rose {self.times:.3g} times "
            f"since step {self.since}, to {self.now:.2g}, and attention changes under it. Go on "
            "from a checkpoint of before, or cap it there now (cap_learning_rate)."
        )


def driver_of(history: History, layer: str) -> Driver | None:
    """Return what was turned up while a layer's attention changed; None where nothing was.

    Args:
        history: the readings so far.
        layer: the attention layer.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step, rate in ((1, 1e-3), (30, 1e-3), (40, 4e-3)):
        ...     values = {"attn": {"max_logit": np.ones(2)}}
        ...     history.add(Reading(step, None, values, learning_rates={"0.0": rate}))
        >>> found = driver_of(history, "attn")
        >>> found.by, found.times, found.since
        ('rate', 4.0, 30)
    """
    return _scale(history, layer) or _rate(history, layer)


def _scale(history: History, layer: str) -> Driver | None:
    known = [(r.step, abs(r.info[layer].scale)) for r in history.readings if layer in r.info]
    if len(known) < 2 or not known[0][1] > 0:
        return None
    first, now = known[0][1], known[-1][1]
    if not now >= RISE * first:
        return None
    since = max(step for step, scale in known if scale <= 1.01 * first)
    return Driver("scale", now / first, first, now, since, first)


def _rate(history: History, layer: str) -> Driver | None:
    steps, risen = history.steps, {}
    rates, calm = history.used_rates, _last_calm_row(history, layer)
    recent = steps >= steps[-1] - SPAN
    for key, column in rates.items():
        now = column[-1]
        before = np.where(recent & (column > 0), column, np.inf)
        if not (0 < now < np.inf) or not now >= HIGHEST * np.nanmax(column):
            continue
        at = int(len(before) - 1 - before[::-1].argmin())  # the last time that it was so low
        if calm is not None and column[calm] > 0 and RISING * before[at] <= now:
            at = min(at, calm)  # it rises still: since attention was well
        if RISE * column[at] <= now:
            well = column[calm or 0]
            fits = min(well, now / RISE) if well > 0 else now / RISE
            risen[key] = (now / column[at], float(column[at]), float(now), int(steps[at]), fits)
    if not risen:
        return None
    alone = set(risen) <= set(history.latest.query_key_groups) and len(risen) < len(rates)
    times, low, now, since, fits = max(risen.values())
    return Driver("query_key" if alone else "rate", float(times), low, now, since, float(fits))


def _last_calm_row(history: History, layer: str) -> int | None:
    """Return the newest row in which the layer's largest score was half of today's."""
    rows = history.rows("max_logit", slice(None), history.of_layer(layer))
    scores = np.nanmax(rows, axis=1, initial=0)
    rows = np.flatnonzero(scores <= scores[-1] / 2)
    return int(rows[-1]) if len(rows) else None
