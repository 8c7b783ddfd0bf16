"""Lines over positions and over time, as heatmaps where there are too many lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    LINES,
    Limits,
    image,
    legend,
    new_axes,
    require,
    root_label,
    saved,
    titled,
)
from stabmon.figures.labels import axis_labels, drawable, ticks, token_labels

MOST_LINES = len(LINES)
"""Lines that dash and marker can distinguish; more are drawn as a heatmap."""


def query_row(
    rows: Mapping[str, np.ndarray],
    *,
    tokens: Sequence[str] | None = None,
    unit: str = "attention probability",
    title: str = "Where one query looks",
    share: bool = True,
    position_name: str = "key",
    path: str | Path | None = None,
) -> Any:
    """Draw rows over the key positions: bars for one short row, lines for several.

    Args:
        rows: name -> ``[K]`` in ``unit``; the first eight are drawn.
        tokens: the keys' tokens, written below where they fit.
        unit: unit of the values.
        title: title of the figure.
        share: start the scale at 0, as for shares.
        position_name: name of a position.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no row.

    Example:
        >>> figure = query_row({"layer 0": np.array([0.75, 0.25])}, tokens=["a", "b"])
        >>> [float(bar.get_height()) for bar in figure.axes[0].patches]
        [0.75, 0.25]
    """
    require(rows, "rows")
    drawn = dict(list(rows.items())[:MOST_LINES])
    count = max(len(row) for row in drawn.values())
    figure, axes = new_axes(min(13.0, max(6.5, 2.0 + 0.16 * min(count, 64))), 3.8)
    if len(drawn) == 1 and count <= 96:
        (row,) = drawn.values()
        axes.bar(np.arange(len(row)), row, color="0.35", edgecolor="black", linewidth=0.4)
    else:
        _draw(axes, drawn, np.arange(count))
    named = axis_labels(axes, "x", count, token_labels(tokens), room=64)
    axes.tick_params(axis="x", labelsize=7 if named else 9)
    axes.set_xlabel(f"{position_name} {'token' if named else 'position'}")
    axes.set_ylabel(unit)
    if share:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    dropped = f"the first {MOST_LINES} of {len(rows)}" if len(rows) > MOST_LINES else ""
    titled(figure, title, dropped)
    return saved(figure, path)


def received_attention(
    received: np.ndarray,
    layers: Sequence[str],
    *,
    unit: str = "mean attention received from the queries that see it",
    pooled: int = 1,
    title: str = "Attention that each position receives",
    path: str | Path | None = None,
) -> Any:
    """Draw the attention that each key receives: a line per layer, or a heatmap.

    Args:
        received: ``[L, S]`` in ``unit``; NaN where a layer has no such position. More than eight
            layers are drawn as a heatmap.
        layers: the layers' names.
        unit: unit of the values.
        pooled: positions per value.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.
    """
    received = np.asarray(received, dtype=np.float64)
    if len(layers) > MOST_LINES:
        figure, axes = _line_map(received, layers, root_label(unit), 9.0, (0.0, None), power=0.5)
        axis_labels(axes, "x", received.shape[1], pooled=pooled)
        axes.set_ylabel("layer")
    else:
        lines = dict(zip(layers, received, strict=True))
        places = np.arange(received.shape[1]) * pooled
        figure, axes = _line_chart(lines, places, unit, (0.0, None), height=4.2)
    axes.set_xlabel("key position")
    titled(figure, title, f"each value is of {pooled} positions" if pooled > 1 else "")
    return saved(figure, path)


def over_time(
    steps: Sequence[float],
    lines: Mapping[str, np.ndarray],
    *,
    unit: str,
    title: str,
    step_name: str = "optimizer step",
    limits: Limits = (None, None),
    path: str | Path | None = None,
) -> Any:
    """Draw values over checkpoints or generation steps: lines, or a heatmap.

    Args:
        steps: ``T`` places in time, growing.
        lines: name -> ``[T]`` in ``unit``; more than eight are drawn as a heatmap.
        unit: unit of the values.
        title: title of the figure.
        step_name: name of a step.
        limits: smallest and largest value of the scale, (0, 1) for shares; None for the data's own.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no line.

    Example:
        >>> figure = over_time([0, 50], {"0": np.array([0.1, 0.9])}, unit="share", title="Sink")
        >>> figure.axes[0].lines[0].get_xdata().tolist()
        [0.0, 50.0]
    """
    require(lines, "lines")
    if len(lines) > MOST_LINES:
        matrix = np.array([np.asarray(line, dtype=np.float64) for line in lines.values()])
        figure, axes = _line_map(matrix, list(lines), unit, 10.0, limits)
        at = ticks(len(steps), 12)
        axes.set_xticks(at, [f"{steps[place]:g}" for place in at])
    else:
        places = np.asarray(steps, dtype=np.float64)
        figure, axes = _line_chart(lines, places, unit, limits, height=4.0)
    axes.set_xlabel(step_name)
    titled(figure, title)
    return saved(figure, path)


def positions_over_time(
    matrix: np.ndarray,
    *,
    steps: Sequence[float] | None = None,
    tokens: Sequence[str] | None = None,
    unit: str,
    title: str,
    step_name: str = "generation step",
    limits: Limits = (0.0, None),
    path: str | Path | None = None,
) -> Any:
    """Draw the weight on each position over time: steps downwards, positions across.

    Args:
        matrix: ``[T, S]`` in ``unit``; NaN where a position does not exist yet.
        steps: ``T`` labels of the rows; 0 … T - 1 if None.
        tokens: ``S`` tokens of the columns.
        unit: unit of the values.
        title: title of the figure.
        step_name: name of a row.
        limits: smallest and largest value of the scale; None for the data's own.
        path: file to save to; None saves nothing.

    Returns:
        The figure.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    figure, axes = new_axes(min(13.0, max(7.0, 2.5 + 0.15 * min(matrix.shape[1], 64))), 4.6)
    shown = image(axes, matrix, limits=limits, power=0.5)
    figure.colorbar(shown, ax=axes, label=root_label(unit))
    names = None if steps is None else [f"{step:g}" for step in steps]
    axis_labels(axes, "y", matrix.shape[0], names, room=24)
    axis_labels(axes, "x", matrix.shape[1], token_labels(tokens), room=64)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel(step_name)
    axes.set_xlabel("position (grey: not there yet)" if np.isnan(matrix).any() else "position")
    titled(figure, title)
    return saved(figure, path)


def _line_map(
    matrix: np.ndarray,
    names: Sequence[str],
    label: str,
    most: float,
    limits: Limits,
    power: float = 1.0,
) -> tuple[Any, Any]:
    """Draw lines as the rows of a heatmap of at most ``most`` inches."""
    figure, axes = new_axes(9.0, min(most, 2.0 + 0.26 * len(names)))
    shown = image(axes, matrix, limits=limits, power=power)
    figure.colorbar(shown, ax=axes, label=label)
    axis_labels(axes, "y", len(names), names)
    return figure, axes


def _line_chart(
    lines: Mapping[str, np.ndarray], places: np.ndarray, unit: str, limits: Limits, height: float
) -> tuple[Any, Any]:
    figure, axes = new_axes(9.0, height)
    _draw(axes, lines, places)
    axes.set_ylabel(unit)
    axes.set_ylim(*limits)
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(axes: Any, lines: Mapping[str, np.ndarray], places: np.ndarray) -> None:
    few = len(places) <= 40
    for (name, line), (colour, dash, marker) in zip(lines.items(), LINES, strict=False):
        line = np.asarray(line, dtype=np.float64)
        axes.plot(
            places[: len(line)],
            line,
            color=colour,
            linestyle=dash,
            marker=marker,
            markevery=1 if few else max(1, len(line) // 12),
            markersize=4,
            linewidth=1.3,
            label=drawable(name),
        )
    if len(lines) > 1:
        legend(axes.figure)
