"""Growth of a layer's scores that learning does not make: its weights grow along themselves, or its
scale does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabmon.rules.tracking.history import History

SPANS = (64, 32, 16, 12, 8, 6, 4, 3, 2)
"""Intervals between readings to look back over, the longest first."""
LEAST_STEPS, MOST_STEPS = 15, 300
"""Optimizer steps that they must cover: over fewer the steps of one momentum look like a drive,
over more it is no run-away.
"""
LEAST_OF_TWO = 40
"""The same for two intervals, which are few to tell what is steady."""
STEADY = 0.4
"""Share of the mean pace that the growth must keep up in every interval: one jump is no drive."""


@dataclass(frozen=True)
class Drive:
    """How the gain of a layer's scores grew; the gain is the scale times the squared norm of what
    makes queries and keys.
    """

    since: int
    """The optimizer step of the reading from which on it is measured."""
    steps: int
    """From there to the newest reading."""
    times: float
    """How many times as large the gain is."""
    coherence: float
    """Growth of its logarithm over all that moved: 1 where every step's whole change goes into the
    norm, near 0 where weights turn.
    """
    of_scale: bool
    """The scale grew, not the weights."""


@dataclass(frozen=True, eq=False)
class _Course:
    """A layer's newest readings: what the gain's logarithm grew from each to the next."""

    steps: np.ndarray
    passed: np.ndarray
    of_scale: np.ndarray
    of_weight: np.ndarray
    way_of_weight: np.ndarray
    """How far the weights moved, on the scale of ``of_weight``."""

    @classmethod
    def of(cls, history: History, layer: str, intervals: int) -> _Course:
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
    """Whether the newest readings allow for a drive, which they seldom do: each interval must keep
    up its share of the slowest pace.
    """
    least = STEADY * math.log(grown) / MOST_STEPS * newest.passed
    return len(least) >= SPANS[-1] and bool(
        (newest.of_scale >= least).all() or (newest.of_weight >= least).all()
    )


def drive(
    history: History, layer: str, *, grown: float = 1.5, coherence: float = 0.75
) -> Drive | None:
    r"""The longest span over which a layer's gain grew steadily, ``grown`` times at least; None
    where it did not.

    What a learner's steps change of W_q and W_k lies for the most part across W: weights turn, and
    their norm grows by a fraction of the way that they move. Weights that are multiplied, decayed
    the wrong way or pushed along one direction grow by all of it. With :math:`u = \|\Delta W\| /
    \|W\|` of a step, coherence is :math:`\Delta\ln\|W\|` over :math:`\sum u`, where the steps
    between two readings are taken to be like those at them. Over 15 steps and more, healthy runs
    came to 0.64 at most (heads that learn to copy), and to 0.45 otherwise. A scale is a constant in
    all but a few models, and moves by less than this in those.
    """
    if not _may_be(_Course.of(history, layer, SPANS[-1]), grown):
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
                return Drive(
                    since=int(course.steps[-span - 1]),
                    steps=int(newest.sum()),
                    times=math.exp(min(total, 700.0)),
                    coherence=total / float(way[-span:].sum()),
                    of_scale=growth is course.of_scale,
                )
    return None
