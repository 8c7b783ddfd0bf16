"""The similarity of layers as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.heatmaps import table_map


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
        unit: the measure.
        title: what is shown.
        path: file to save; None for none.

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
