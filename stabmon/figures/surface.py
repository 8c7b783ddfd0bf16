"""A map as a surface in three dimensions, to turn with the mouse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.pooling import block_max, pooled_note

SIDE = 128
"""Longest axis of a surface; longer ones are pooled."""


def attention_surface(
    matrix: np.ndarray,
    *,
    unit: str = "attention probability",
    title: str = "Attention as a surface",
    pooled: int = 1,
    axes_names: tuple[str, str] = ("query position", "key position"),
    path: str | Path | None = None,
) -> Any:
    """Draw a map as a surface with plotly.

    Args:
        matrix: ``[Q, K]`` in ``unit``; beyond 128 × 128 points it is pooled by the maximum.
        unit: unit of the height.
        title: title of the figure.
        pooled: positions per cell, if the map was pooled.
        axes_names: names of rows and columns.
        path: ``.html`` file to save: self-contained, about 5 MB, opens offline; None saves nothing.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        ImportError: if plotly is not installed.
        ValueError: if ``matrix`` has not two axes, or the file is no ``.html``.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError('plotly is not installed: pip install "stabmon[plotly]"') from error
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"a map of shape {matrix.shape}: give [Q, K]")
    if path is not None and Path(path).suffix != ".html":
        raise ValueError(f"{path}: a surface is saved as .html")
    height, factor = block_max(matrix, SIDE)
    factor *= pooled
    rows, columns = (np.arange(size) * factor for size in height.shape)
    note = pooled_note(factor)
    surface = go.Surface(
        z=height, x=columns, y=rows, colorscale="Cividis", colorbar={"title": {"text": unit}}
    )
    figure = go.Figure(surface)
    figure.update_layout(
        title={"text": f"{title}<br><sub>{note}</sub>" if note else title},
        scene={
            "xaxis": {"title": {"text": axes_names[1]}},
            "yaxis": {"title": {"text": axes_names[0]}, "autorange": "reversed"},
            "zaxis": {"title": {"text": unit}},
        },
    )
    if path is not None:
        figure.write_html(path, include_plotlyjs=True, full_html=True)
    return figure
