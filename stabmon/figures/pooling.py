"""Pool maps by the maximum of square blocks."""

from __future__ import annotations

import numpy as np


def block_max(matrix: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Pool the last two axes by the maximum of square blocks, down to ``side``.

    Args:
        matrix: ``[..., Q, K]``, any unit; NaN counts as a block's value only if all of it is NaN.
        side: longest axis that is left.

    Returns:
        The pooled array and the block's side, 1 if nothing had to be pooled.

    Example:
        >>> block_max(np.arange(16.0).reshape(4, 4), side=2)
        (array([[ 5.,  7.],
               [13., 15.]]), 2)
    """
    factor = -(-max(matrix.shape[-2:]) // side)
    return (matrix, 1) if factor <= 1 else (block_max_by(matrix, factor), factor)


def block_max_by(matrix: np.ndarray, factor: int) -> np.ndarray:
    """Pool the last two axes by the maximum of blocks of ``factor`` × ``factor``.

    Args:
        matrix: ``[..., Q, K]``, any unit; NaN counts only where a block is all NaN.
        factor: side of a block.

    Returns:
        ``[..., ceil(Q / factor), ceil(K / factor)]``.

    Example:
        >>> block_max_by(np.arange(9.0).reshape(3, 3), 2)
        array([[4., 5.],
               [7., 8.]])
    """
    rows, columns = matrix.shape[-2:]
    wide = [(0, 0)] * (matrix.ndim - 2) + [(0, -rows % factor), (0, -columns % factor)]
    kind = matrix.dtype if matrix.dtype.kind == "f" else np.dtype(np.float64)
    padded = np.pad(matrix.astype(kind), wide, constant_values=np.nan)
    up, across = padded.shape[-2] // factor, padded.shape[-1] // factor
    blocks = padded.reshape(*matrix.shape[:-2], up, factor, across, factor)
    pooled: np.ndarray = np.fmax.reduce(np.fmax.reduce(blocks, axis=-1), axis=-2)
    return pooled


def pooled_note(factor: int) -> str:
    """Return a note on how many pairs a cell stands for; empty for 1.

    >>> pooled_note(4)
    'each cell is the largest of 4 × 4 pairs'
    """
    return f"each cell is the largest of {factor} × {factor} pairs" if factor > 1 else ""
