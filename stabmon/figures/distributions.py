"""Distributions over heads and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import Limits, legend, new_axes, require, saved, titled
from stabmon.figures.labels import axis_labels, drawable


def over_layers(
    values: np.ndarray,
    layers: Sequence[str],
    *,
    unit: str,
    title: str,
    limits: Limits = (None, None),
    path: str | Path | None = None,
) -> Any:
    """Draw a statistic over the layers: a mark per head and a line through the means.

    Args:
        values: ``[L, H]`` in ``unit``; NaN where a layer has fewer heads.
        layers: the layers' names, first to last.
        unit: unit of the values.
        title: title of the figure.
        limits: smallest and largest value of the scale, (0, 1) for shares; None for the data's own.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Example:
        >>> figure = over_layers(np.array([[1.0, 3.0]]), ["0"], unit="nats", title="Entropy")
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0]
    """
    values = np.asarray(values, dtype=np.float64)
    figure, axes = new_axes(min(12.0, max(6.0, 2.0 + 0.35 * len(layers))), 3.8)
    place = np.arange(len(layers))
    if values.shape[1] > 1:
        shift = np.linspace(-0.16, 0.16, values.shape[1])
        at = np.broadcast_to(place[:, None] + shift, values.shape)
        axes.scatter(at, values, s=14, facecolor="none", edgecolor="0.45", label="a head")
    counted = np.isfinite(values)
    mean = np.where(counted, values, 0).sum(1) / np.where(counted.any(1), counted.sum(1), np.nan)
    axes.plot(place, mean, color="black", marker="_", markersize=12, label="mean over heads")
    axis_labels(axes, "x", len(layers), layers)
    axes.set_ylim(*limits)
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    legend(figure)
    titled(figure, title)
    return saved(figure, path)


def distributions(
    groups: Mapping[str, np.ndarray],
    *,
    unit: str,
    title: str,
    group_name: str = "layer",
    limits: Limits = (None, None),
    path: str | Path | None = None,
) -> Any:
    """Draw one box per group of values.

    A box shows median and quartiles, whiskers reach 1.5 quartile ranges, outliers are dots.

    Args:
        groups: name -> values in ``unit``, one per sample (and head); non-finite ones are dropped.
        unit: unit of the values.
        title: title of the figure.
        group_name: name of a group.
        limits: smallest and largest value of the scale, (0, 1) for shares; None for the data's own.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no group.
    """
    require(groups, "groups")
    values = [np.asarray(each, dtype=np.float64).ravel() for each in groups.values()]
    finite = [each[np.isfinite(each)] for each in values]
    names = [drawable(name) for name in groups]
    figure, axes = new_axes(min(13.0, max(6.0, 1.6 + 0.5 * len(groups))), 4.0)
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
