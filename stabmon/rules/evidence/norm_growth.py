"""Growth of a layer's scores that learning does not make, by weights or scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabmon.rules.tracking.history import History

SPANS = (64, 32, 16, 12, 8, 6, 4, 3, 2)
"""Intervals between readings to look back over, the longest first."""
LEAST_STEPS, MOST_STEPS = 15, 300
"""Least and largest number of optimizer steps that a span must cover.

Over fewer the steps of one momentum look like sustained growth, over more it is no runaway.
"""
LEAST_OF_TWO = 40
"""Least number for a span of two intervals, which are few to be steady."""
STEADY = 0.4
"""Share of the mean pace to be kept up in every interval.

One jump is not sustained.
"""


@dataclass(frozen=True)
class SustainedGrowth:
    """Growth of the gain of a layer's scores.

    The gain is the scale times the squared norm of what makes queries and keys.
    """

    since: int
    """Optimizer step of the reading from which on it is measured."""
    steps: int
    """Optimizer steps from there to the newest reading."""
    times: float
    """Gain now, as a multiple of the gain there."""
    coherence: float
    """Growth of the gain's logarithm over all that moved.

    1 where every step's whole change goes into the norm, near 0 where weights turn.
    """
    of_scale: bool
    """True if the scale grew, not the weights."""


@dataclass(frozen=True, eq=False)
class _Course:
    """Growth of the gain's logarithm from each of a layer's readings to the next."""

    steps: np.ndarray
    passed: np.ndarray
    of_scale: np.ndarray
    of_weight: np.ndarray
    way_of_weight: np.ndarray
    """Distance that the weights moved, on the scale of ``of_weight``."""

    @classmethod
    def of(cls, history: History, layer: str, intervals: int) -> _Course:
        """Return the course over a layer's newest readings."""
        readings = [r for r in history.readings[-intervals - 1 :] if layer in r.info]
        steps = np.array([r.step for r in readings], dtype=np.float64)
        scale = np.array([abs(r.info[layer].scale) for r in readings])
        moved = [r.query_key.get(layer) for r in readings]
        weight = np.array([math.nan if each is None else each.weight for each in moved])
        share = np.array([math.nan if each is None else each.relative_update for each in moved])
        passed = np.diff(steps)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_scale, of_weight = np.diff(np.log(scale)), 2 * np.diff(np.log(weight))
        return cls(steps, passed, of_scale, of_weight, (share[1:] + share[:-1]) * passed)


def _may_be(newest: _Course, grown: float) -> bool:
    """Return whether the newest readings allow for sustained growth; they seldom do.

    Each interval must keep up its share of the slowest pace.
    """
    least = STEADY * math.log(grown) / MOST_STEPS * newest.passed
    return len(least) >= SPANS[-1] and bool(
        (newest.of_scale >= least).all() or (newest.of_weight >= least).all()
    )


def _grew(history: History, layer: str) -> bool:
    """Return whether the scale or the weights grew at all since the last reading."""
    newest = [each for each in history.readings[-2:] if layer in each.info]
    if len(newest) < 2:
        return len(history) > 1  # it was missing in one of them
    before, now = newest
    if abs(now.info[layer].scale) > abs(before.info[layer].scale):
        return True
    first, last = before.query_key.get(layer), now.query_key.get(layer)
    return first is not None and last is not None and last.weight > first.weight


def sustained_growth(
    history: History, layer: str, *, grown: float = 1.5, coherence: float = 0.75
) -> SustainedGrowth | None:
    r"""Return the longest span over which a layer's gain grew steadily.

    Most of what a learner's steps change of W_q and W_k lies across W: weights turn, and their norm
    grows by a fraction of the way that they move. Weights that are multiplied, decayed the wrong
    way or pushed along one direction grow by all of it. With :math:`u = \|\Delta W\| / \|W\|` of a
    step, coherence is :math:`\Delta\ln\|W\|` over :math:`\sum u`, where the steps between two
    readings are taken to be like those at them. Over 15 steps and more, healthy runs came to 0.64
    at most (heads that learn to copy), and to 0.45 otherwise. A scale is a constant in all but a
    few models, and moves by less than this in those.

    Args:
        history: the readings so far.
        layer: the attention layer.
        grown: least growth of the gain, as a multiple.
        coherence: least coherence, in [0, 1].

    Returns:
        None where the gain did not grow like this.
    """
    if not _grew(history, layer) or not _may_be(_Course.of(history, layer, SPANS[-1]), grown):
        return None
    course = _Course.of(history, layer, SPANS[0])
    for growth, way in (
        (course.of_scale, np.abs(course.of_scale)),
        (course.of_weight, course.way_of_weight),
    ):
        for span in SPANS:
            total, newest = float(growth[-span:].sum()), course.passed[-span:]
            least = LEAST_STEPS if span > 2 else LEAST_OF_TWO
            if span > len(growth) or not least <= newest.sum() <= MOST_STEPS:
                continue
            if not (total >= math.log(grown) and total >= coherence * way[-span:].sum()):
                continue  # NaN is no growth
            if (growth[-span:] / newest).min() >= STEADY * total / newest.sum():
                return SustainedGrowth(
                    since=int(course.steps[-span - 1]),
                    steps=int(newest.sum()),
                    times=math.exp(min(total, 700.0)),
                    coherence=total / float(way[-span:].sum()),
                    of_scale=growth is course.of_scale,
                )
    return None
