"""Heatmaps of attention: every head, one map, one map a layer, any table of layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    axis_labels,
    block_max_by,
    drawable,
    image,
    new_figure,
    pooled_note,
    saved,
    ticks,
    titled,
    token_labels,
)

MOST_PANELS = 16
"""Layers, and heads, of one grid; of more an even choice is drawn, and the title says so."""
SCALES = ("shared", "own", "unit")
MOST_PIXELS = 6500
"""Longest side of a saved grid. A panel has a pixel for every cell, and more dots an inch if need
be; where that does not fit into this, the grid is pooled."""


def head_grid(
    maps: Sequence[np.ndarray],
    layers: Sequence[str],
    *,
    heads: Sequence[Sequence[int]] | None = None,
    unit: str = "attention probability",
    scale: str = "shared",
    pooled: int = 1,
    title: str = "Attention of every head",
    path: str | Path | None = None,
) -> Any:
    """Draw the map of every head, layers downwards and heads across.

    Args:
        maps: one ``[H, Q, K]`` a layer, in ``unit``; H, Q and K may differ between layers.
        layers: the layers' names.
        heads: the heads' numbers, one list a layer; 0 … H - 1 if None.
        unit: what the colours mean.
        scale: ``shared`` (0 to the largest value drawn), ``own`` (each panel its own largest
            value), or ``unit`` (0 to 1).
        pooled: positions a cell stands for along each axis, if the maps were pooled.
        title: what is shown.
        path: file to save; None for none.

    Returns:
        The figure; each panel's image holds its map unchanged.

    Raises:
        ValueError: for no maps, an unknown scale, or names that do not fit the maps.
    """
    _check(maps, layers, scale)
    rows = ticks(len(maps), MOST_PANELS)
    widest = max(each.shape[0] for each in maps)
    columns = ticks(widest, MOST_PANELS)
    size = 1.15 if max(len(rows), len(columns)) > 6 else 1.7
    figure, grid, bar = _panels(len(rows), len(columns), size, scale != "own")
    maps, pooled = _fitted(figure, maps, size, pooled)
    limits = _limits(
        [maps[row][[c for c in columns if c < maps[row].shape[0]]] for row in rows], scale
    )
    shown = None
    for panels, row in zip(grid, rows, strict=True):
        for axes, column in zip(panels, columns, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if column >= maps[row].shape[0]:
                axes.set_axis_off()
                continue
            shown = image(axes, maps[row][column], limits=limits, power=0.5, aspect="auto")
            number = column if heads is None else heads[row][column]
            axes.set_title(f"head {number}", fontsize=8, pad=2)
        panels[0].set_ylabel(drawable(_layer(layers[row])), fontsize=8)
    if shown is not None and scale != "own":
        figure.colorbar(shown, cax=bar, label=f"{unit}\n(square-root scale)")
    parts = [pooled_note(pooled)]
    if len(rows) < len(maps) or len(columns) < widest:
        parts.append(f"{len(rows)} of {len(maps)} layers, {len(columns)} of {widest} heads")
    if scale == "own":
        parts.append("each panel on its own scale")
    titled(figure, title, "; ".join(part for part in parts if part))
    return saved(figure, path)


def single_map(
    matrix: np.ndarray,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    unit: str = "attention probability",
    limits: tuple[float | None, float | None] = (0.0, None),
    power: float = 0.5,
    pooled: int = 1,
    title: str = "Attention",
    axes_names: tuple[str, str] = ("query", "key"),
    path: str | Path | None = None,
) -> Any:
    """Draw one map with its axes, its tokens where there is room, and a colour bar.

    Args:
        matrix: ``[Q, K]`` in ``unit``.
        queries: tokens of the rows.
        keys: tokens of the columns.
        unit: what the colours mean.
        limits: of the scale; None for the map's own.
        power: of the scale: 1 is linear, 0.5 a square root, which shows small shares.
        pooled: positions a cell stands for along each axis.
        title: what is shown.
        axes_names: of rows and columns.
        path: file to save; None for none.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    side = min(11.0, max(4.6, 0.17 * max(matrix.shape)))
    figure = new_figure(
        side + 1.4, side * min(1.0, max(0.35, matrix.shape[0] / matrix.shape[1])) + 1.2
    )
    axes = figure.add_subplot()
    shown = image(axes, matrix, limits=limits, power=power)
    scale = " (square-root scale)" if power == 0.5 else ""
    figure.colorbar(shown, ax=axes, label=f"{unit}{scale}")
    down = axis_labels(axes, "y", matrix.shape[0], token_labels(queries), room=64, pooled=pooled)
    across = axis_labels(axes, "x", matrix.shape[1], token_labels(keys), room=64, pooled=pooled)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(labelsize=7 if max(matrix.shape) > 24 else 8)
    axes.set_ylabel(f"{axes_names[0]} {'token' if down else 'position'}")
    axes.set_xlabel(f"{axes_names[1]} {'token' if across else 'position'}")
    titled(figure, title, pooled_note(pooled))
    return saved(figure, path)


def layer_grid(
    maps: Sequence[np.ndarray],
    layers: Sequence[str],
    *,
    unit: str = "attention probability, mean over heads",
    scale: str = "shared",
    pooled: int = 1,
    title: str = "Attention by layer",
    path: str | Path | None = None,
) -> Any:
    """Draw one map a layer side by side, for comparing layers.

    Args:
        maps: one ``[Q, K]`` a layer.
        layers: the layers' names.
        unit: what the colours mean.
        scale: see :func:`head_grid`.
        pooled: positions a cell stands for along each axis.
        title: what is shown.
        path: file to save; None for none.
    """
    _check(maps, layers, scale)
    chosen = ticks(len(maps), 24)
    across = min(len(chosen), 6)
    down = -(-len(chosen) // across)
    figure, grid, bar = _panels(down, across, 1.6, scale != "own", gap=0.42)
    maps, pooled = _fitted(figure, maps, 1.6, pooled)
    limits = _limits([maps[at] for at in chosen], scale)
    shown = None
    for place, axes in enumerate(grid.flat):
        if place >= len(chosen):
            axes.set_axis_off()
            continue
        at = chosen[place]
        shown = image(axes, maps[at], limits=limits, power=0.5)
        axes.set_title(drawable(_layer(layers[at])), fontsize=8, pad=2)
        axis_labels(axes, "x", maps[at].shape[1], most=4, pooled=pooled)
        axis_labels(axes, "y", maps[at].shape[0], most=4, pooled=pooled)
        axes.tick_params(labelsize=7)
    if scale != "own":
        figure.colorbar(shown, cax=bar, label=f"{unit}\n(square-root scale)")
    parts = [pooled_note(pooled)]
    if len(chosen) < len(maps):
        parts.append(f"{len(chosen)} of {len(maps)} layers")
    if scale == "own":
        parts.append("each panel on its own scale")
    titled(figure, title, "; ".join(part for part in parts if part))
    return saved(figure, path)


def table_map(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    unit: str,
    title: str,
    row_name: str = "layer",
    column_name: str = "query head",
    limits: tuple[float | None, float | None] = (None, None),
    numbers: bool | None = None,
    path: str | Path | None = None,
) -> Any:
    """Draw a table of numbers, such as a statistic of every layer and head.

    Args:
        matrix: ``[rows, columns]`` in ``unit``; NaN where a row has fewer columns.
        rows: names of the rows.
        columns: names of the columns; their numbers if None.
        unit: what the colours mean.
        title: what is shown.
        row_name: what a row is.
        column_name: what a column is.
        limits: of the scale; (0, 1) for shares.
        numbers: write each value into its cell; if None, where there is room.
        path: file to save; None for none.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    down, across = matrix.shape
    numbers = across <= 16 and down <= 24 if numbers is None else numbers
    cell = 0.55 if numbers else 0.26
    figure = new_figure(
        min(14.0, max(5.0, 3.2 + cell * across)), min(12.0, max(2.4, 1.5 + 0.3 * down))
    )
    axes = figure.add_subplot()
    shown = image(axes, matrix, limits=limits)
    figure.colorbar(shown, ax=axes, label=unit)
    axis_labels(axes, "y", down, [_short(row) for row in rows])
    axis_labels(axes, "x", across, columns)
    axes.tick_params(labelsize=8)
    axes.set_ylabel(row_name)
    axes.set_xlabel(column_name)
    if numbers:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                tone = "black" if shown.norm(value) > 0.55 else "white"
                axes.text(
                    column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=tone
                )
    titled(figure, title)
    return saved(figure, path)


def _panels(
    down: int, across: int, size: float, with_bar: bool, gap: float = 0.26
) -> tuple[Any, np.ndarray, Any]:
    """Lay out square panels of ``size`` inches by hand, which takes half the time of a layout
    engine.

    Returns:
        The figure, its panels ``[down, across]``, and axes for a colour bar or None.
    """
    left, right, top, bottom = 0.95, 1.15 if with_bar else 0.3, 0.85, 0.6
    wide = max(5.2, left + right + across * size + (across - 1) * gap)
    high = max(2.9, top + bottom + down * size + (down - 1) * gap)
    figure = new_figure(wide, high)
    figure.set_layout_engine("none")
    left += (wide - left - right - across * size - (across - 1) * gap) / 2
    span = across * size + (across - 1) * gap
    grid = np.empty((down, across), dtype=object)
    for row, column in np.ndindex(down, across):
        x, y = left + column * (size + gap), high - top - (row + 1) * size - row * gap
        grid[row, column] = figure.add_axes((x / wide, y / high, size / wide, size / high))
    bar = None
    if with_bar:
        low = high - top - down * size - (down - 1) * gap
        box = ((left + span + 0.2) / wide, low / high, 0.16 / wide, (high - top - low) / high)
        bar = figure.add_axes(box, label="<colorbar>")
    middle = (left + span / 2) / wide
    figure.text(middle, 0.1 / high, "key position →", ha="center", va="bottom", fontsize=9)
    height = (high - top + bottom) / 2 / high
    figure.text(0.1 / wide, height, "query position ↓", rotation=90, va="center", fontsize=9)
    return figure, grid, bar


def _fitted(
    figure: Any, maps: Sequence[np.ndarray], size: float, pooled: int
) -> tuple[list[np.ndarray], int]:
    """Set dots an inch so that each cell of a panel of ``size`` inches has one; pool beyond
    that.
    """
    side = max(max(each.shape[-2:]) for each in maps)
    inches = max(figure.get_size_inches())
    dots = 1.02 * side / size
    factor = 1
    if dots * inches > MOST_PIXELS:
        factor = int(np.ceil(dots * inches / MOST_PIXELS))
        dots /= factor
    figure.set_dpi(max(100.0, dots))
    drawn = [block_max_by(each, factor) if factor > 1 else each for each in maps]
    return drawn, pooled * factor


def _check(maps: Sequence[np.ndarray], layers: Sequence[str], scale: str) -> None:
    if not len(maps):
        raise ValueError("no maps to draw: give one a layer")
    if len(maps) != len(layers):
        raise ValueError(f"{len(maps)} maps and {len(layers)} names of layers: give one name a map")
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: use {', '.join(SCALES)}")


def _limits(maps: Sequence[np.ndarray], scale: str) -> tuple[float | None, float | None]:
    if scale == "unit":
        return 0.0, 1.0
    if scale == "own":
        return 0.0, None
    finite = [float(each[np.isfinite(each)].max()) for each in maps if np.isfinite(each).any()]
    return 0.0, max(finite, default=1.0) or 1.0


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[-(most - 1) :]}"


def _layer(name: str) -> str:
    return f"layer {name}" if len(name) <= 6 else _short(name)


def letter_map(
    letters: Sequence[Sequence[str]],
    rows: Sequence[str],
    legend: Mapping[str, str],
    *,
    columns: Sequence[str] | None = None,
    title: str,
    row_name: str = "layer",
    column_name: str = "query head",
    path: str | Path | None = None,
) -> Any:
    """Draw a table of kinds: a letter in each cell, a tone behind it, and what letters mean.

    Args:
        letters: one list of letters a row; rows may differ in length.
        rows: names of the rows.
        legend: letter -> meaning, in the order of the tones.
        columns: names of the columns; their numbers if None.
        title: what is shown.
        row_name: what a row is.
        column_name: what a column is.
        path: file to save; None for none.
    """
    order = list(legend)
    wide = max((len(row) for row in letters), default=1)
    matrix = np.full((len(letters), wide), np.nan)
    for place, row in zip(matrix, letters, strict=True):
        place[: len(row)] = [
            order.index(letter[0]) if letter[:1] in order else np.nan for letter in row
        ]
    figure = new_figure(
        min(14.0, max(6.0, 4.4 + 0.34 * wide)), min(14.0, max(2.6, 1.3 + 0.3 * len(rows)))
    )
    axes = figure.add_subplot()
    image(axes, matrix, limits=(-2.5, len(order) + 0.5), cmap="Greys_r")
    axis_labels(axes, "y", len(rows), [_short(row) for row in rows])
    axis_labels(axes, "x", wide, columns)
    for down, line in enumerate(letters):
        for column, letter in enumerate(line):
            known = letter[:1] in order
            dark = known and (order.index(letter[0]) + 2.5) / (len(order) + 3) < 0.45
            axes.text(
                column,
                down,
                letter,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
                parse_math=False,
            )
    axes.set_ylabel(row_name)
    axes.set_xlabel(column_name)
    present = {letter for line in letters for cell in line for letter in cell}
    lines = [f"{letter}  {meaning}" for letter, meaning in legend.items() if letter in present]
    axes.text(
        1.02,
        1.0,
        "\n".join(lines),
        transform=axes.transAxes,
        va="top",
        fontsize=8,
        parse_math=False,
    )
    titled(figure, title)
    return saved(figure, path)
