"""Tables of layers and heads as heatmaps: numbers, letters, similarities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import Limits, image, new_axes, saved, titled
from stabmon.figures.labels import axis_labels, shortened


def table_map(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    unit: str,
    title: str,
    row_name: str = "layer",
    column_name: str = "query head",
    limits: Limits = (None, None),
    numbers: bool | None = None,
    path: str | Path | None = None,
) -> Any:
    """Draw a table of numbers, such as a statistic of every layer and head.

    Args:
        matrix: ``[rows, columns]`` in ``unit``; NaN where a row has fewer columns.
        rows: names of the rows.
        columns: names of the columns; their numbers if None.
        unit: unit of the values, for the colour bar.
        title: title of the figure.
        row_name: name of the vertical axis.
        column_name: name of the horizontal axis.
        limits: smallest and largest value of the scale, (0, 1) for shares; None for the data's own.
        numbers: write each value into its cell; if None, where it fits.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Example:
        >>> figure = table_map(np.eye(2), ["0", "1"], unit="share", title="Sinks")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1', '0', '0', '1']
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    down, across = matrix.shape
    numbers = across <= 16 and down <= 24 if numbers is None else numbers
    cell = 0.55 if numbers else 0.26
    width, height = max(5.0, 3.2 + cell * across), max(2.4, 1.5 + 0.3 * down)
    figure, axes = new_axes(min(14.0, width), min(12.0, height))
    shown = image(axes, matrix, limits=limits)
    figure.colorbar(shown, ax=axes, label=unit)
    axis_labels(axes, "y", down, [shortened(row) for row in rows])
    axis_labels(axes, "x", across, columns)
    axes.tick_params(labelsize=8)
    axes.set_ylabel(row_name)
    axes.set_xlabel(column_name)
    if numbers:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                dark = shown.norm(value) <= 0.55
                _write(axes, column, row, f"{value:.2g}", dark, fontsize=7)
    titled(figure, title)
    return saved(figure, path)


def similarity_matrix(
    matrix: np.ndarray,
    layers: Sequence[str],
    *,
    unit: str = "cosine similarity",
    title: str = "How alike the layers attend",
    path: str | Path | None = None,
) -> Any:
    """Draw the similarity of every pair of layers on a scale from 0 to 1.

    Args:
        matrix: ``[L, L]``, in [0, 1] for maps that are nowhere negative.
        layers: the layers' names.
        unit: name of the measure.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if the matrix is not square, or the names do not fit it.

    Example:
        >>> figure = similarity_matrix(np.eye(2), ["first", "second"])
        >>> figure.axes[0].images[0].get_clim()
        (0.0, 1.0)
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape != (len(layers), len(layers)):
        raise ValueError(f"a matrix of shape {matrix.shape} for {len(layers)} layers: give [L, L]")
    return table_map(
        matrix,
        layers,
        layers if len(layers) <= 16 else None,
        unit=unit,
        title=title,
        column_name="layer",
        limits=(0.0, 1.0),
        numbers=len(layers) <= 12,
        path=path,
    )


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
    """Draw a table of categories: a letter and a tone in each cell, and a legend.

    Args:
        letters: letters of each row's cells; rows may differ in length.
        rows: names of the rows.
        legend: letter -> meaning, in the order of the tones.
        columns: names of the columns; their numbers if None.
        title: title of the figure.
        row_name: name of the vertical axis.
        column_name: name of the horizontal axis.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Example:
        >>> figure = letter_map([["S", "L"]], ["0"], {"S": "sink", "L": "local"}, title="Roles")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['S', 'L', 'S  sink\\nL  local']
    """
    order = list(legend)
    wide = max((len(row) for row in letters), default=1)
    matrix = np.full((len(letters), wide), np.nan)
    for place, row in zip(matrix, letters, strict=True):
        place[: len(row)] = [
            order.index(letter[0]) if letter[:1] in order else np.nan for letter in row
        ]
    width, height = max(6.0, 4.4 + 0.34 * wide), max(2.6, 1.3 + 0.3 * len(rows))
    figure, axes = new_axes(min(14.0, width), min(14.0, height))
    image(axes, matrix, limits=(-2.5, len(order) + 0.5), cmap="Greys_r")
    axis_labels(axes, "y", len(rows), [shortened(row) for row in rows])
    axis_labels(axes, "x", wide, columns)
    for down, line in enumerate(letters):
        for column, letter in enumerate(line):
            tone = (matrix[down, column] + 2.5) / (len(order) + 3)  # NaN for unknown letters
            _write(axes, column, down, letter, tone < 0.45, fontsize=8)
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


def _write(axes: Any, column: int, row: int, text: str, dark: bool, fontsize: int) -> None:
    """Write into the middle of a cell, white on dark cells."""
    colour = "white" if dark else "black"
    axes.text(
        column,
        row,
        text,
        ha="center",
        va="center",
        fontsize=fontsize,
        color=colour,
        parse_math=False,
    )
