"""Figures of the keys that a compressed KV cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import image, new_axes, new_figure, saved, titled
from stabmon.figures.labels import axis_labels, drawable, ticks


def kept_positions(
    share: np.ndarray,
    layers: Sequence[str],
    *,
    window: int = 0,
    pooled: int = 1,
    title: str = "Which positions of the prompt stay in the cache",
    path: str | Path | None = None,
) -> Any:
    """Draw the share of kv heads that keep each position, layers downwards.

    Args:
        share: ``[L, S]`` in [0, 1]; NaN for a layer that is not compressed.
        layers: the layers' names.
        window: number of last positions that are always kept, marked by a dashed line.
        pooled: positions per cell.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.
    """
    share = np.asarray(share, dtype=np.float64)
    figure, axes = new_axes(10.0, min(9.0, 2.2 + 0.28 * len(layers)))
    shown = image(axes, share, limits=(0.0, 1.0))
    figure.colorbar(shown, ax=axes, label="share of kv heads\nthat keep the key")
    axis_labels(axes, "y", len(layers), layers)
    axis_labels(axes, "x", share.shape[1], pooled=pooled)
    notes = []
    if window and window < share.shape[1] * pooled:
        edge = share.shape[1] - window / pooled - 0.5
        axes.axvline(edge, color="white", linewidth=2.2)
        axes.axvline(edge, color="black", linestyle="--", linewidth=1.1)
        notes.append(f"dashed: the last {window} positions are always kept")
    if np.isnan(share).any():
        notes.append("grey: not compressed")
    axes.set_xlabel("key position")
    axes.set_ylabel("layer")
    titled(figure, title, *notes)
    return saved(figure, path)


def decode_pattern(
    share: np.ndarray,
    layers: Sequence[str],
    *,
    steps: Sequence[int] | None = None,
    pooled: int = 1,
    title: str = "What stays in the cache while tokens are generated",
    path: str | Path | None = None,
) -> Any:
    """Draw the kept positions of every layer at every decode step.

    Args:
        share: ``[L, T, S]``, the share of kv heads that hold each position after each step; NaN for
            positions that do not exist yet.
        layers: the layers' names; of more than twelve an even choice is drawn.
        steps: ``T`` labels of the steps; 0 … T - 1 if None.
        pooled: positions per cell.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure, one panel per layer.
    """
    share = np.asarray(share, dtype=np.float64)
    chosen = ticks(len(layers), 12)
    across = min(3, len(chosen))
    down = -(-len(chosen) // across)
    figure = new_figure(3.0 + 3.0 * across, 1.4 + 1.9 * down)
    grid = figure.subplots(down, across, squeeze=False)
    shown = None
    names = None if steps is None else [str(step) for step in steps]
    for place, axes in enumerate(grid.flat):
        if place >= len(chosen):
            axes.set_axis_off()
            continue
        shown = image(axes, share[chosen[place]], limits=(0.0, 1.0))
        axes.set_title(drawable(f"layer {layers[chosen[place]]}"), fontsize=9, pad=3)
        axis_labels(axes, "y", share.shape[1], names, room=6, most=6)
        axis_labels(axes, "x", share.shape[2], most=6, pooled=pooled)
        axes.tick_params(labelsize=7)
    if shown is not None:
        figure.colorbar(shown, ax=grid, label="share of kv heads that hold the key")
    figure.supxlabel("key position", fontsize=9)
    figure.supylabel("decode step", fontsize=9)
    grey = "grey: not there yet" if np.isnan(share).any() else ""
    thinned = f"{len(chosen)} of {len(layers)} layers" if len(chosen) < len(layers) else ""
    titled(figure, title, grey, thinned)
    return saved(figure, path)
