"""Per-head view of a dashboard: one signal of every head as a matrix and an image."""

from __future__ import annotations

import numpy as np

from stabmon.records import Reading
from stabmon.signals.presentation import presentation_of

_VIRIDIS = (
    0x440154,
    0x482878,
    0x3E4989,
    0x31688E,
    0x26828E,
    0x1F9E89,
    0x35B779,
    0x6ECE58,
    0xB5DE2B,
    0xFDE725,
)
"""Ten evenly spaced colours of matplotlib's viridis: dark is low, bright is high."""
_GREY = 160


def head_matrix(reading: Reading, signal: str) -> np.ndarray:
    """Return one signal of every head.

    Args:
        reading: the measurements of one step.
        signal: name of the signal.

    Returns:
        ``[layers, heads]`` float64; NaN where a layer has fewer heads or no such signal.
    """
    rows = [
        np.asarray(signals.get(signal, ()), dtype=np.float64) for signals in reading.layers.values()
    ]
    matrix = np.full((len(rows), max((row.size for row in rows), default=0)), np.nan)
    for row, values in zip(matrix, rows, strict=True):
        row[: values.size] = values
    return matrix


def signal_names(reading: Reading) -> list[str]:
    """Return the signals of any layer, in the order of first appearance."""
    return list(dict.fromkeys(name for signals in reading.layers.values() for name in signals))


def colour_range(signal: str, matrix: np.ndarray) -> tuple[float, float]:
    """Return the (dark, bright) ends of a signal's colour scale.

    Args:
        signal: name of the signal.
        matrix: its values.

    Returns:
        0 and 1 for probabilities and shares, so that steps compare; else the finite extremes.
    """
    low, high = presentation_of(signal).limits
    if low is not None and high is not None:
        return low, high
    finite = matrix[np.isfinite(matrix)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def head_image(matrix: np.ndarray, low: float, high: float) -> np.ndarray:
    """Draw a matrix as an image: one square per head, layers downwards, in viridis.

    Args:
        matrix: ``[layers, heads]``; heads that are not finite are grey.
        low: value of the darkest colour.
        high: value of the brightest colour.

    Returns:
        uint8 ``[height, width, 3]``, red, green and blue.
    """
    share = np.clip((matrix - low) / (high - low), 0, 1) if high > low else np.zeros_like(matrix)
    anchors = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in _VIRIDIS], dtype=np.float64)
    finite = np.isfinite(matrix)
    position = np.where(finite, share, 0) * (len(anchors) - 1)
    colours = np.stack(
        [np.interp(position, np.arange(len(anchors)), channel) for channel in anchors.T], axis=-1
    )
    colours[~finite] = _GREY
    side = max(4, min(24, 640 // max(1, *matrix.shape)))
    pixels: np.ndarray = np.rint(colours).astype(np.uint8).repeat(side, axis=0).repeat(side, axis=1)
    return pixels
