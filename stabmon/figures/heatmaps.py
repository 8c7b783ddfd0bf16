"""Heatmaps of attention maps: one map, all heads, one map per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    Limits,
    image,
    new_axes,
    new_figure,
    require,
    root_label,
    saved,
    titled,
)
from stabmon.figures.labels import axis_labels, layer_label, ticks, token_labels
from stabmon.figures.pooling import block_max_by, pooled_note

MOST_PANELS = 16
"""Layers, and heads, drawn in one grid; of more, an even choice named in the title."""
SCALES = ("shared", "own", "unit")
MOST_PIXELS = 6500
"""Longest side of a saved grid in pixels.

Every cell of a panel gets a pixel, by more dots per inch if necessary; beyond this limit the grid
is pooled.
"""


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
        maps: ``[H, Q, K]`` per layer, in ``unit``; H, Q and K may differ between layers.
        layers: the layers' names.
        heads: the heads' numbers, one list per layer; 0 … H - 1 if None.
        unit: unit of the values, for the colour bar.
        scale: ``shared`` (0 to the largest value drawn), ``own`` (0 to the panel's largest), or
            ``unit`` (0 to 1).
        pooled: positions per cell along each axis, if the maps were pooled.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure; each panel's image holds its map unchanged.

    Raises:
        ValueError: for no maps, an unknown scale, or names that do not fit the maps.

    Example:
        >>> figure = head_grid([np.eye(3)[None]], ["0"])
        >>> figure.axes[0].get_title()
        'head 0'
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
        panels[0].set_ylabel(layer_label(layers[row]), fontsize=8)
    if shown is not None and scale != "own":
        figure.colorbar(shown, cax=bar, label=root_label(unit))
    whole = len(rows) == len(maps) and len(columns) == widest
    chosen = f"{len(rows)} of {len(maps)} layers, {len(columns)} of {widest} heads"
    titled(figure, title, pooled_note(pooled), "" if whole else chosen, _scale_note(scale))
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
    """Draw one map per layer side by side, for comparing layers.

    Args:
        maps: ``[Q, K]`` per layer, in ``unit``.
        layers: the layers' names.
        unit: unit of the values, for the colour bar.
        scale: see :func:`head_grid`.
        pooled: positions per cell along each axis, if the maps were pooled.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: for no maps, an unknown scale, or names that do not fit the maps.
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
        axes.set_title(layer_label(layers[at]), fontsize=8, pad=2)
        axis_labels(axes, "x", maps[at].shape[1], most=4, pooled=pooled)
        axis_labels(axes, "y", maps[at].shape[0], most=4, pooled=pooled)
        axes.tick_params(labelsize=7)
    if scale != "own":
        figure.colorbar(shown, cax=bar, label=root_label(unit))
    thinned = f"{len(chosen)} of {len(maps)} layers" if len(chosen) < len(maps) else ""
    titled(figure, title, pooled_note(pooled), thinned, _scale_note(scale))
    return saved(figure, path)


def single_map(
    matrix: np.ndarray,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    unit: str = "attention probability",
    limits: Limits = (0.0, None),
    power: float = 0.5,
    pooled: int = 1,
    title: str = "Attention",
    axes_names: tuple[str, str] = ("query", "key"),
    path: str | Path | None = None,
) -> Any:
    """Draw one map with tokens on its axes where they fit.

    Args:
        matrix: ``[Q, K]`` in ``unit``.
        queries: tokens of the rows.
        keys: tokens of the columns.
        unit: unit of the values, for the colour bar.
        limits: smallest and largest value of the scale; None for the map's own.
        power: exponent of the scale: 1 is linear, 0.5 a square root, which shows small shares.
        pooled: positions per cell along each axis, if the map was pooled.
        title: title of the figure.
        axes_names: names of rows and columns.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Example:
        >>> single_map(np.eye(2), keys=["a", "b"]).axes[0].get_xlabel()
        'key token'
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    side = min(11.0, max(4.6, 0.17 * max(matrix.shape)))
    height = side * min(1.0, max(0.35, matrix.shape[0] / matrix.shape[1]))
    figure, axes = new_axes(side + 1.4, height + 1.2)
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


def _panels(
    down: int, across: int, size: float, with_bar: bool, gap: float = 0.26
) -> tuple[Any, np.ndarray, Any]:
    """Lay out square panels of ``size`` inches by hand.

    This takes half the time of a layout engine.

    Returns:
        The figure, its panels ``[down, across]``, and axes for a colour bar or None.
    """
    left, right, top, bottom = 0.95, 1.15 if with_bar else 0.3, 0.85, 0.6
    span = across * size + (across - 1) * gap
    wide = max(5.2, left + right + across * size + (across - 1) * gap)
    high = max(2.9, top + bottom + down * size + (down - 1) * gap)
    figure = new_figure(wide, high)
    figure.set_layout_engine("none")
    left += (wide - left - right - across * size - (across - 1) * gap) / 2
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
    """Set the dots per inch so that each cell has one; pool beyond ``MOST_PIXELS``."""
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
    require(maps, "maps")
    if len(maps) != len(layers):
        raise ValueError(f"{len(maps)} maps and {len(layers)} names of layers: give one name a map")
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: use {', '.join(SCALES)}")


def _limits(maps: Sequence[np.ndarray], scale: str) -> Limits:
    if scale == "unit":
        return 0.0, 1.0
    if scale == "own":
        return 0.0, None
    finite = [float(each[np.isfinite(each)].max()) for each in maps if np.isfinite(each).any()]
    return 0.0, max(finite, default=1.0) or 1.0


def _scale_note(scale: str) -> str:
    return "each panel on its own scale" if scale == "own" else ""
