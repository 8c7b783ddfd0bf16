"""Figures of a compressed KV cache: budgets, preferences and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    HATCHES,
    LINES,
    Limits,
    legend,
    new_axes,
    new_figure,
    require,
    saved,
    titled,
)
from stabmon.figures.labels import axis_labels


def budget_bars(
    budgets: Mapping[str, np.ndarray],
    layers: Sequence[str],
    *,
    full: float | None = None,
    unit: str = "keys kept a kv head",
    title: str = "Cache budget of every layer",
    path: str | Path | None = None,
) -> Any:
    """Draw the cache budget of every layer, one bar per rule.

    Args:
        budgets: name of the rule -> ``[L]`` in ``unit``.
        layers: the layers' names.
        full: size of an uncompressed layer in ``unit``, drawn as a dashed line.
        unit: unit of the budgets.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no budget.

    Example:
        >>> figure = budget_bars({"filled": np.array([3, 5])}, ["0", "1"], full=16)
        >>> [int(bar.get_height()) for bar in figure.axes[0].patches]
        [3, 5]
    """
    figure, axes = _grouped_bars(budgets, layers, unit)
    if full is not None:
        label = f"full cache ({full:g})"
        axes.axhline(full, color="black", linestyle="--", linewidth=1, label=label)
    legend(figure)
    titled(figure, title)
    return saved(figure, path)


def preservation_bars(
    shares: Mapping[str, np.ndarray],
    layers: Sequence[str],
    *,
    unit: str = "share of the attention mass that is kept",
    title: str = "How much attention the kept keys hold",
    limits: Limits = (0.0, 1.0),
    path: str | Path | None = None,
) -> Any:
    """Draw the attention that every layer preserves, one bar per policy.

    Args:
        shares: policy -> ``[L]`` in ``unit``.
        layers: the layers' names.
        unit: unit of the values.
        title: title of the figure.
        limits: smallest and largest value of the scale.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if there is nothing to draw.
    """
    figure, axes = _grouped_bars(shares, layers, unit)
    axes.set_ylim(*limits)
    legend(figure)
    titled(figure, title)
    return saved(figure, path)


def layer_preferences(
    dispersion: np.ndarray,
    shift: np.ndarray,
    preference: np.ndarray,
    layers: Sequence[str],
    *,
    title: str = "What the budgets rest on",
    path: str | Path | None = None,
) -> Any:
    """Draw spatial dispersion, temporal shift and preference score of every layer.

    Args:
        dispersion: ``[L]``, summed entropy of the window's attention in nats.
        shift: ``[L]``, summed variance of the window's attention.
        preference: ``[L]``, relative.
        layers: the layers' names.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure, one panel per quantity.
    """
    figure = new_figure(min(13.0, max(8.0, 3.0 + 0.45 * len(layers))), 3.4)
    panels = figure.subplots(1, 3)
    total = np.nansum(preference)
    named = (
        ("dispersion D", "nats, summed over heads and queries", dispersion),
        ("shift V", "variance, summed over heads and keys", shift),
        ("preference P", "share of the layers' sum", preference / (total or np.nan)),
    )
    for axes, (name, unit, values) in zip(panels, named, strict=True):
        axes.bar(np.arange(len(layers)), values, color="0.55", edgecolor="black", linewidth=0.6)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("layer")
        axis_labels(axes, "x", len(layers), layers, room=16)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.3)
    titled(figure, title)
    return saved(figure, path)


def loss_against_size(
    sizes: Sequence[float],
    policies: Mapping[str, np.ndarray],
    *,
    full: float | None = None,
    unit: str = "perplexity",
    title: str = "What a smaller cache costs",
    path: str | Path | None = None,
) -> Any:
    """Draw perplexity against cache size, one line per policy.

    Args:
        sizes: ``N`` cache sizes in keys per layer.
        policies: name -> ``[N]`` or ``[N, prompts]`` in ``unit``; the line is the median over
            prompts, the bar the middle half of them.
        full: value with the whole cache, drawn as a dashed line.
        unit: unit of the values.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no policy.
    """
    require(policies, "policies")
    figure, axes = new_axes(8.5, 4.4)
    place = np.asarray(sizes, dtype=np.float64)
    step = (place.max() / max(place.min(), 1.0)) ** (1 / 60) if len(place) > 1 else 1.0
    prompts = 1
    for number, (name, values) in enumerate(policies.items()):
        colour, dash, marker = LINES[number % len(LINES)]
        table = np.asarray(values, dtype=np.float64).reshape(len(place), -1)
        prompts = max(prompts, table.shape[1])
        low, middle, high = np.nanquantile(table, (0.25, 0.5, 0.75), axis=1)
        beside = place * step ** (number - (len(policies) - 1) / 2) if prompts > 1 else place
        axes.errorbar(
            beside,
            middle,
            yerr=np.stack([middle - low, high - middle]) if table.shape[1] > 1 else None,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            capsize=3,
            label=name,
        )
    if full is not None:
        axes.axhline(full, color="0.4", linestyle="--", linewidth=1, label="full cache")
    if len(place) > 1 and place.min() > 0:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(place, [f"{size:g}" for size in place])
    axes.set_xlabel("cache size in keys, mean over layers")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    legend(figure)
    bars = f"median of {prompts} prompts, bars: their middle half; set side by side"
    titled(figure, title, bars if prompts > 1 else "")
    return saved(figure, path)


def _grouped_bars(
    groups: Mapping[str, np.ndarray], layers: Sequence[str], unit: str
) -> tuple[Any, Any]:
    """Draw bars side by side, distinguished by tone and hatching."""
    require(groups, "bars")
    width = min(14.0, max(6.5, 3.0 + 0.16 * len(layers) * (len(groups) + 1)))
    figure, axes = new_axes(width, 3.9)
    thick = 0.8 / len(groups)
    tones = np.linspace(0.25, 0.92, len(groups))
    for number, (name, values) in enumerate(groups.items()):
        axes.bar(
            np.arange(len(layers)) + (number - (len(groups) - 1) / 2) * thick,
            values,
            thick,
            color=f"{tones[number]:.2f}" if len(groups) > 1 else "0.55",
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="black",
            linewidth=0.5,
            label=name,
        )
    axis_labels(axes, "x", len(layers), layers)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    return figure, axes
