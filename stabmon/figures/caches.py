"""Figures of a compressed KV cache: budgets, what they rest on, what is kept, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    HATCHES,
    LINES,
    axis_labels,
    drawable,
    image,
    new_figure,
    saved,
    ticks,
    titled,
)


def budget_bars(
    budgets: Mapping[str, np.ndarray],
    layers: Sequence[str],
    *,
    full: float | None = None,
    unit: str = "keys kept a kv head",
    title: str = "Cache budget of every layer",
    path: str | Path | None = None,
) -> Any:
    """Draw the budgets of every layer, one bar a rule.

    Args:
        budgets: name of the rule -> ``[L]`` in ``unit``.
        layers: the layers' names.
        full: what an uncompressed layer holds, drawn as a dashed line.
        unit: of the budgets.
        title: what is shown.
        path: file to save; None for none.

    Raises:
        ValueError: if there is no budget.
    """
    figure, axes = _grouped_bars(budgets, layers)
    if full is not None:
        axes.axhline(
            full, color="black", linestyle="--", linewidth=1, label=f"full cache ({full:g})"
        )
    axes.set_ylabel(unit)
    axes.set_xlabel("layer")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
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
        title: what is shown.
        path: file to save; None for none.
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


def kept_positions(
    share: np.ndarray,
    layers: Sequence[str],
    *,
    window: int = 0,
    pooled: int = 1,
    title: str = "Which positions of the prompt stay in the cache",
    path: str | Path | None = None,
) -> Any:
    """Draw the share of kv heads that keep each position: layers downwards, positions across.

    Args:
        share: ``[L, S]`` in [0, 1]; NaN for a layer that is not compressed.
        layers: the layers' names.
        window: last positions that are always kept, marked by a dashed line.
        pooled: positions a cell stands for.
        title: what is shown.
        path: file to save; None for none.
    """
    share = np.asarray(share, dtype=np.float64)
    figure = new_figure(10.0, min(9.0, 2.2 + 0.28 * len(layers)))
    axes = figure.add_subplot()
    shown = image(axes, share, limits=(0.0, 1.0))
    figure.colorbar(shown, ax=axes, label="share of kv heads\nthat keep the key")
    axis_labels(axes, "y", len(layers), layers)
    axis_labels(axes, "x", share.shape[1], pooled=pooled)
    notes = []
    if window and window < share.shape[1] * pooled:
        axes.axvline(share.shape[1] - window / pooled - 0.5, color="white", linewidth=2.2)
        axes.axvline(
            share.shape[1] - window / pooled - 0.5, color="black", linestyle="--", linewidth=1.1
        )
        notes.append(f"dashed: the last {window} positions are always kept")
    if np.isnan(share).any():
        notes.append("grey: not compressed")
    axes.set_xlabel("key position")
    axes.set_ylabel("layer")
    titled(figure, title, "; ".join(notes))
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
    """Draw the kept positions of every layer at every decode step, one panel a layer.

    Args:
        share: ``[L, T, S]``: share of kv heads that hold each position after each step; NaN for
            positions that do not exist yet.
        layers: the layers' names; of more than twelve an even choice is drawn.
        steps: ``T`` labels of the steps; 0 … T - 1 if None.
        pooled: positions a cell stands for.
        title: what is shown.
        path: file to save; None for none.
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
    notes = ["grey: not there yet"] if np.isnan(share).any() else []
    if len(chosen) < len(layers):
        notes.append(f"{len(chosen)} of {len(layers)} layers")
    titled(figure, title, "; ".join(notes))
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
    """Draw perplexity against cache size: a line a policy, with the spread over the prompts.

    Args:
        sizes: ``N`` cache sizes in keys a layer.
        policies: name -> ``[N]`` or ``[N, prompts]`` in ``unit``; the line is the median over
            prompts, the bar the middle half of them.
        full: the value with the whole cache, a dashed line.
        unit: of the values.
        title: what is shown.
        path: file to save; None for none.

    Raises:
        ValueError: if there is no policy.
    """
    if not policies:
        raise ValueError("no policies to draw: give at least one")
    figure = new_figure(8.5, 4.4)
    axes = figure.add_subplot()
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
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    note = (
        f"median of {prompts} prompts, bars: their middle half; set side by side"
        if prompts > 1
        else ""
    )
    titled(figure, title, note)
    return saved(figure, path)


def preservation_bars(
    shares: Mapping[str, np.ndarray],
    layers: Sequence[str],
    *,
    unit: str = "share of the attention mass that is kept",
    title: str = "How much attention the kept keys hold",
    limits: tuple[float | None, float | None] = (0.0, 1.0),
    path: str | Path | None = None,
) -> Any:
    """Draw what every layer preserves, one bar a policy.

    Args:
        shares: policy -> ``[L]`` in ``unit``.
        layers: the layers' names.
        unit: of the values.
        title: what is shown.
        limits: of the scale.
        path: file to save; None for none.

    Raises:
        ValueError: if there is nothing to draw.
    """
    figure, axes = _grouped_bars(shares, layers)
    axes.set_ylim(*limits)
    axes.set_ylabel(unit)
    axes.set_xlabel("layer")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    titled(figure, title)
    return saved(figure, path)


def _grouped_bars(groups: Mapping[str, np.ndarray], layers: Sequence[str]) -> tuple[Any, Any]:
    """Bars side by side, told apart by tone and hatching."""
    if not groups:
        raise ValueError("no bars to draw: give at least one group")
    figure = new_figure(min(14.0, max(6.5, 3.0 + 0.16 * len(layers) * (len(groups) + 1))), 3.9)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    tones = np.linspace(0.25, 0.92, len(groups))
    for number, (name, values) in enumerate(groups.items()):
        at = np.arange(len(layers)) + (number - (len(groups) - 1) / 2) * width
        hatch = HATCHES[number % len(HATCHES)]
        tone = f"{tones[number]:.2f}" if len(groups) > 1 else "0.55"
        axes.bar(
            at, values, width, color=tone, hatch=hatch, edgecolor="black", linewidth=0.5, label=name
        )
    axis_labels(axes, "x", len(layers), layers)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes
