"""Figures of controllers' effects over the forwards of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stabmon.figures.canvas import new_figure, saved
from stabmon.figures.labels import short_names
from stabmon.records import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "controller_kl": "KL(original ‖ modified), nats",
    "attention_entropy": "entropy of modified rows, nats",
    "attention_variance": "variance of modified weights",
    "mean_adjustment": "mean |key bias|, nats",
    "query_gain": "mean query gain",
    "linear_share": "linear share",
}
MOST = 16
"""Largest number of layers or heads in a grid; of more, every n-th is shown."""


def values_of(readings: Sequence[Reading], signal: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return layers, steps ``[T]`` and values ``[L, H, T]``, NaN where there is none.

    Raises:
        ValueError: if no reading has the signal.
    """
    layers = list(
        dict.fromkeys(
            name
            for reading in readings
            for name, found in reading.layers.items()
            if signal in found
        )
    )
    if not layers:
        raise ValueError(
            f"no reading has {signal!r}: run the model within the watch, and name one of "
            f"{', '.join(LABELS)}"
        )
    heads = max(
        len(reading.layers[name][signal])
        for reading in readings
        for name in layers
        if signal in reading.layers.get(name, {})
    )
    values = np.full((len(layers), heads, len(readings)), np.nan)
    for t, reading in enumerate(readings):
        for row, name in enumerate(layers):
            found = reading.layers.get(name, {}).get(signal, ())
            values[row, : len(found), t] = found
    return layers, np.array([reading.step for reading in readings]), values


def grid(readings: Sequence[Reading], signal: str, path: str | Path | None = None) -> Figure:
    """Draw one quantity of every head over the forwards, all on one scale.

    Layers are downwards, heads across.

    Args:
        readings: oldest first.
        signal: the quantity.
        path: file to save the figure to; None to save nothing.

    Raises:
        ValueError: if no reading has the signal.
        ImportError: if matplotlib is not installed.
    """
    layers, steps, values = values_of(readings, signal)
    rows, columns = (range(0, n, -(-n // MOST)) for n in values.shape[:2])
    figure: Figure = new_figure(width=2.2 + 1.7 * len(columns), height=1.2 + 1.15 * len(rows))
    panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    names, pattern = short_names(layers)
    for place, row in enumerate(rows):
        for across, column in enumerate(columns):
            axes = panels[place, across]
            axes.plot(
                steps, values[row, column], linewidth=1.2, marker="." if len(steps) < 3 else None
            )
            axes.grid(alpha=0.3)
            if place == 0:
                axes.set_title(f"head {column}", fontsize=9)
            if across == 0:
                axes.set_ylabel(names[row], fontsize=9)
    figure.supxlabel("forward")
    figure.supylabel(f"layer of {pattern}" if pattern else "layer")
    figure.suptitle(LABELS.get(signal, signal.replace("_", " ")))
    return saved(figure, path)


def series(readings: Sequence[Reading], path: str | Path | None = None) -> Figure:
    """Draw every quantity that changes over the forwards, one panel each.

    A layer is one line, the mean over its heads.

    Args:
        readings: oldest first.
        path: file to save the figure to; None to save nothing.

    Raises:
        ValueError: if there is no reading.
        ImportError: if matplotlib is not installed.
    """
    from matplotlib import colormaps

    known = [
        name
        for name in LABELS
        if any(name in found for reading in readings for found in reading.layers.values())
    ]
    if not known:
        raise ValueError("no readings to draw: run the model within the watch")
    shown = [
        name
        for name in known
        if np.nanmax(values := values_of(readings, name)[2]) > np.nanmin(values)
    ] or known
    figure: Figure = new_figure(width=8.5, height=1.0 + 1.7 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        layers, steps, values = values_of(readings, name)
        colours = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
        for line, colour, label in zip(values, colours, short_names(layers)[0], strict=True):
            finite = np.isfinite(line)
            mean = np.where(
                finite.any(0),
                np.where(finite, line, 0).sum(0) / np.maximum(finite.sum(0), 1),
                np.nan,
            )
            axes.plot(
                steps,
                mean,
                color=colour,
                label=label,
                linewidth=1.3,
                marker="." if len(steps) < 3 else None,
            )
        axes.set_title(LABELS[name], fontsize=9, loc="left")
        axes.grid(alpha=0.3)
    panels[0].legend(
        title="layer",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        ncols=1 + len(layers) // 12,
    )
    panels[-1].set_xlabel("forward")
    return saved(figure, path)
