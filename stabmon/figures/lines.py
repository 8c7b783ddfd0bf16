"""Lines and distributions: a query's row, received attention, statistics over layers and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    LINES,
    axis_labels,
    drawable,
    image,
    new_figure,
    saved,
    ticks,
    titled,
    token_labels,
)

MOST_LINES = len(LINES)
"""Lines that can be told apart by dash and marker; beyond, a heatmap is drawn."""


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
    """Draw rows over the key positions: bars for a single short one, lines for several.

    Args:
        rows: name -> ``[K]`` in ``unit``; at most eight are drawn, in order.
        tokens: the keys' tokens, written below where there is room.
        unit: of the values.
        title: what is shown.
        share: the values are shares: the scale starts at 0.
        position_name: what a position is.
        path: file to save; None for none.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("no rows to draw: give at least one")
    drawn = dict(list(rows.items())[:MOST_LINES])
    count = max(len(row) for row in drawn.values())
    figure = new_figure(min(13.0, max(6.5, 2.0 + 0.16 * min(count, 64))), 3.8)
    axes = figure.add_subplot()
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
    titled(figure, title, _left_out(len(rows)))
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
    """Draw what each key position receives: a line a layer, or a heatmap of more than eight.

    Args:
        received: ``[L, S]`` in ``unit``; NaN where a layer has no such position.
        layers: the layers' names.
        unit: of the values.
        pooled: positions a value stands for.
        title: what is shown.
        path: file to save; None for none.
    """
    received = np.asarray(received, dtype=np.float64)
    if len(layers) > MOST_LINES:
        figure = new_figure(9.0, min(9.0, 2.0 + 0.26 * len(layers)))
        axes = figure.add_subplot()
        shown = image(axes, received, limits=(0.0, None), power=0.5)
        figure.colorbar(shown, ax=axes, label=f"{unit}\n(square-root scale)")
        axis_labels(axes, "y", len(layers), layers)
        axis_labels(axes, "x", received.shape[1], pooled=pooled)
        axes.set_ylabel("layer")
    else:
        figure = new_figure(9.0, 4.2)
        axes = figure.add_subplot()
        _draw(axes, dict(zip(layers, received, strict=True)), np.arange(received.shape[1]) * pooled)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
    axes.set_xlabel("key position")
    titled(figure, title, f"each value is of {pooled} positions" if pooled > 1 else "")
    return saved(figure, path)


def over_layers(
    values: np.ndarray,
    layers: Sequence[str],
    *,
    unit: str,
    title: str,
    limits: tuple[float | None, float | None] = (None, None),
    path: str | Path | None = None,
) -> Any:
    """Draw a statistic over the layers: a mark a head, and a line through the heads' mean.

    Args:
        values: ``[L, H]`` in ``unit``; NaN where a layer has fewer heads.
        layers: the layers' names, first to last.
        unit: of the values.
        title: what is shown.
        limits: of the scale; (0, 1) for shares.
        path: file to save; None for none.
    """
    values = np.asarray(values, dtype=np.float64)
    figure = new_figure(min(12.0, max(6.0, 2.0 + 0.35 * len(layers))), 3.8)
    axes = figure.add_subplot()
    place = np.arange(len(layers))
    if values.shape[1] > 1:
        spread = np.linspace(-0.16, 0.16, values.shape[1])
        at = np.broadcast_to(place[:, None] + spread, values.shape)
        axes.scatter(at, values, s=14, facecolor="none", edgecolor="0.45", label="a head")
    counted = np.isfinite(values)
    mean = np.where(counted, values, 0).sum(1) / np.where(counted.any(1), counted.sum(1), np.nan)
    axes.plot(place, mean, color="black", marker="_", markersize=12, label="mean over heads")
    axis_labels(axes, "x", len(layers), layers)
    axes.set_ylim(*limits)
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    titled(figure, title)
    return saved(figure, path)


def over_time(
    steps: Sequence[float],
    lines: Mapping[str, np.ndarray],
    *,
    unit: str,
    title: str,
    step_name: str = "optimizer step",
    limits: tuple[float | None, float | None] = (None, None),
    path: str | Path | None = None,
) -> Any:
    """Draw values over checkpoints or generation steps: lines, or a heatmap of more than eight.

    Args:
        steps: ``T`` places in time, growing.
        lines: name -> ``[T]`` in ``unit``.
        unit: of the values.
        title: what is shown.
        step_name: what a step is.
        limits: of the scale; (0, 1) for shares.
        path: file to save; None for none.

    Raises:
        ValueError: if there is no line.
    """
    if not lines:
        raise ValueError("no lines to draw: give at least one")
    if len(lines) > MOST_LINES:
        matrix = np.array([np.asarray(line, dtype=np.float64) for line in lines.values()])
        figure = new_figure(9.0, min(10.0, 2.0 + 0.26 * len(lines)))
        axes = figure.add_subplot()
        shown = image(axes, matrix, limits=limits)
        figure.colorbar(shown, ax=axes, label=unit)
        axis_labels(axes, "y", len(lines), list(lines))
        at = ticks(len(steps), 12)
        axes.set_xticks(at, [f"{steps[place]:g}" for place in at])
    else:
        figure = new_figure(9.0, 4.0)
        axes = figure.add_subplot()
        _draw(axes, lines, np.asarray(steps, dtype=np.float64))
        axes.set_ylabel(unit)
        axes.set_ylim(*limits)
        axes.grid(alpha=0.3)
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
    limits: tuple[float | None, float | None] = (0.0, None),
    path: str | Path | None = None,
) -> Any:
    """Draw how the weight on each position evolves: time downwards, positions across.

    Args:
        matrix: ``[T, S]`` in ``unit``; NaN where a position does not exist yet.
        steps: ``T`` labels of the rows; 0 … T - 1 if None.
        tokens: ``S`` tokens of the columns.
        unit: of the values.
        title: what is shown.
        step_name: what a row is.
        limits: of the scale.
        path: file to save; None for none.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    figure = new_figure(min(13.0, max(7.0, 2.5 + 0.15 * min(matrix.shape[1], 64))), 4.6)
    axes = figure.add_subplot()
    shown = image(axes, matrix, limits=limits, power=0.5)
    figure.colorbar(shown, ax=axes, label=f"{unit}\n(square-root scale)")
    names = None if steps is None else [f"{step:g}" for step in steps]
    axis_labels(axes, "y", matrix.shape[0], names, room=24)
    axis_labels(axes, "x", matrix.shape[1], token_labels(tokens), room=64)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel(step_name)
    axes.set_xlabel("position (grey: not there yet)" if np.isnan(matrix).any() else "position")
    titled(figure, title)
    return saved(figure, path)


def distributions(
    groups: Mapping[str, np.ndarray],
    *,
    unit: str,
    title: str,
    group_name: str = "layer",
    limits: tuple[float | None, float | None] = (None, None),
    path: str | Path | None = None,
) -> Any:
    """Draw one box a group: median, quartiles, whiskers to 1.5 quartile ranges, all outliers.

    Args:
        groups: name -> values in ``unit``, one a sample (and head); those not finite are left out.
        unit: of the values.
        title: what is shown.
        group_name: what a group is.
        limits: of the scale; (0, 1) for shares.
        path: file to save; None for none.

    Raises:
        ValueError: if there is no group.
    """
    if not groups:
        raise ValueError("no groups to draw: give at least one")
    values = [np.asarray(each, dtype=np.float64).ravel() for each in groups.values()]
    finite = [each[np.isfinite(each)] for each in values]
    names = [drawable(name) for name in groups]
    figure = new_figure(min(13.0, max(6.0, 1.6 + 0.5 * len(groups))), 4.0)
    axes = figure.add_subplot()
    axes.boxplot(
        finite,
        medianprops={"color": "black", "linewidth": 2},
        flierprops={"marker": ".", "markersize": 4, "markeredgecolor": "0.4"},
    )
    turned = {"rotation": 90} if max(map(len, names)) > 6 and len(names) > 6 else {}
    axes.set_xticks(np.arange(1, len(names) + 1), names, fontsize=8, parse_math=False, **turned)
    axes.set_ylim(*limits)
    axes.set_xlabel(group_name)
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    counts = sorted({len(each) for each in finite})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    titled(figure, title, f"{many} values a box; line: median; box: middle half")
    return saved(figure, path)


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
        legend = axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _left_out(count: int) -> str:
    return f"the first {MOST_LINES} of {count}" if count > MOST_LINES else ""
