"""Signals of every head over training, as arrays, and fewer columns for a page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from stabmon.records import Reading, head_count

FIRST = ("max_logit", "hnf_log_curvature", "precision_bits")
"""Signals shown after the entropy; others follow where there is room."""
CONTROLLERS = (
    "controller_kl",
    "query_gain",
    "mean_adjustment",
    "linear_share",
    "attention_variance",
)
"""Quantities of :class:`~stabmon.controllers.watch.ControllerWatch`."""
TITLES = {
    "normalized_entropy": "normalized entropy",
    "max_logit": "largest score",
    "hnf_log_curvature": "curvature",
    "hnf_log_curvature_bound": "bound of the curvature",
    "precision_bits": "bits needed",
    "controller_kl": "KL to the attention without controllers",
    "query_gain": "gain of the queries",
    "mean_adjustment": "bias of the keys",
}
"""Names in words; other signals have their own."""


def title_of(signal: str) -> str:
    """Return the name of a signal in words.

    Example:
        >>> title_of("max_logit"), title_of("sink_mass")
        ('largest score', 'sink mass')
    """
    return TITLES.get(signal, signal.replace("_", " "))


@dataclass(frozen=True, eq=False)
class HeadSignals:
    """Values of N heads, over all layers, at T sampled steps."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """``[T]`` sampled steps."""
    layers: tuple[tuple[str, int], ...] = ()
    """Name and number of heads of each layer, in the order of columns."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Signal -> ``[T, N]``; NaN where it was not measured."""

    @property
    def heads(self) -> int:
        """Number of heads over all layers."""
        return sum(heads for _, heads in self.layers)

    @property
    def names(self) -> list[str]:
        """Names of the signals, those shown first at the front."""
        front = (*CONTROLLERS[:2], self.entropy, *FIRST, *CONTROLLERS[2:])
        return [name for name in dict.fromkeys((*front, *self.values)) if name in self.values]

    @property
    def entropy(self) -> str:
        """The entropy to show: rows of few keys have no normalized one."""
        known = "normalized_entropy" in self.values
        return "normalized_entropy" if known else "attention_entropy"

    def places(self) -> dict[str, slice]:
        """Return the columns of each layer."""
        found, start = {}, 0
        for name, heads in self.layers:
            found[name] = slice(start, start + heads)
            start += heads
        return found

    def head_at(self, column: int) -> tuple[str, int]:
        """Return layer and head of a column."""
        for name, heads in self.layers:
            if column < heads:
                return name, column
            column -= heads
        raise IndexError(column)


def head_signals(readings: Sequence[Reading], layers_left_out: Collection[int] = ()) -> HeadSignals:
    """Gather the signals of all heads from readings.

    Args:
        readings: in the order of steps; those without layers are left out.
        layers_left_out: steps of readings that lack layers which were measured; there these keep
            the values of their last reading.

    Returns:
        Arrays over every layer and signal of any reading; signals that are nowhere a number are
        left out.
    """
    sampled = [reading for reading in readings if reading.layers]
    counts: dict[str, int] = {}
    names: dict[str, None] = {}
    for reading in sampled:
        for layer, signals in reading.layers.items():
            counts[layer] = max(counts.get(layer, 0), head_count(signals))
            names.update(dict.fromkeys(signals))
    steps = np.array([reading.step for reading in sampled], dtype=np.int64)
    total = sum(counts.values())
    values = {name: np.full((len(sampled), total), np.nan, dtype=np.float32) for name in names}
    layers = tuple(counts.items())
    places = HeadSignals(layers=layers).places()
    with np.errstate(over="ignore"):
        for at, reading in enumerate(sampled):
            keeps = at > 0 and reading.step in layers_left_out
            for found in values.values() if keeps else ():
                found[at] = found[at - 1]
            for layer, signals in reading.layers.items():
                start = places[layer].start
                for found in values.values() if keeps else ():
                    found[at, places[layer]] = np.nan
                for name, heads in signals.items():
                    values[name][at, start : start + np.size(heads)] = heads
    for name in [name for name, found in values.items() if np.isnan(found).all()]:
        del values[name]
    return HeadSignals(steps, layers, values)


def columns(count: int, keep: Collection[int], most: int) -> np.ndarray:
    """Divide samples into at most ``most`` groups of neighbours.

    Args:
        count: number of samples.
        keep: samples that stand alone; the first ones where there are more than half of ``most``.
        most: largest number of groups, at least 1.

    Returns:
        The first sample of each group, increasing.

    Example:
        >>> columns(4, (), 10)
        array([0, 1, 2, 3])
        >>> columns(12, (6,), 5)
        array([0, 4, 6, 7, 8])
    """
    if count <= most:
        return np.arange(count)
    alone = [at for at in keep if 0 <= at < count][: most // 2]
    borders = {edge for at in alone for edge in (at, at + 1)} | {0}
    room = max(1, most - len(borders) + 1)
    width = -(-count // room)
    while True:
        starts = sorted({*borders, *range(0, count, width)} - {count})
        if len(starts) <= most or width >= count:
            return np.array(starts[:most])
        width += 1


def extremes(values: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value of each group of samples.

    Args:
        values: ``[T, N]``.
        starts: first sample of each of C groups.

    Returns:
        Two arrays ``[C, N]``; NaN where a group holds nothing else.

    Example:
        >>> low, high = extremes(np.array([[1.0], [3.0], [2.0]]), np.array([0, 2]))
        >>> low[:, 0].tolist(), high[:, 0].tolist()
        ([1.0, 2.0], [3.0, 2.0])
    """
    if len(starts) == 0:
        return values[:0], values[:0]
    return (
        np.fmin.reduceat(values, starts, axis=0),
        np.fmax.reduceat(values, starts, axis=0),
    )
