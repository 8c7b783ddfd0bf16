"""Signals of attention: every head at one step, and every layer over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stabmon.figures.canvas import LINES, Limits, image, new_axes, saved
from stabmon.figures.labels import short_names, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stats = Mapping[str, Mapping[str, np.ndarray]]
"""``stats[layer][signal]`` is ``[H]``, one value per query head."""

_LEGEND_LAYERS = 8
"""Largest number of layers in a legend; for more, a colour bar is drawn."""
_MOST_WRITTEN = 16
"""Largest number of layers and of heads whose values are written into the cells."""


def signal_heatmap(
    stats: Stats,
    signal: str,
    step: int,
    path: str | Path | None = None,
    *,
    unit: str,
    limits: Limits = (None, None),
) -> Figure:
    """Draw one signal of every head at one step, layers downwards and heads across.

    Small maps have the value in each cell. A head that is not finite is grey and hatched, and
    layers with fewer heads end in plain grey.

    Args:
        stats: ``stats[layer][signal]`` is ``[H]``, one value per query head.
        signal: name of the signal to draw.
        step: the optimizer step, for the title.
        path: file to save to, its format taken from the suffix; None saves nothing.
        unit: unit of the signal, for the colour bar.
        limits: smallest and largest value of the scale, (0, 1) for shares, so that steps compare;
            None for the data's own.

    Returns:
        The figure.

    Raises:
        ValueError: if no layer has the signal.
        ImportError: if matplotlib is not installed.

    Example:
        >>> stats = {"a": {"max_logit": np.array([1.0, 2.0])}}
        >>> signal_heatmap(stats, "max_logit", 10, unit="score").axes[0].get_title()
        'Max logit of every head at step 10'
    """
    _check(signal, stats.values())
    rows = {
        layer: np.asarray(signals[signal], dtype=np.float64)
        for layer, signals in stats.items()
        if signal in signals
    }
    matrix = np.full((len(rows), max(row.size for row in rows.values())), np.nan)
    for place, row in zip(matrix, rows.values(), strict=True):
        place[: row.size] = row
    layers, heads = matrix.shape
    across = 0.4 if heads <= _MOST_WRITTEN else 0.3
    width, height = max(6.0, 3.6 + across * heads), max(2.6, 1.5 + 0.3 * layers)
    figure: Figure
    figure, axes = new_axes(min(12.0, width), min(12.0, height))
    shown_map = image(axes, matrix, limits=limits)
    figure.colorbar(shown_map, ax=axes, label=unit)
    _mark_cells(axes, shown_map, matrix, [row.size for row in rows.values()])
    names, pattern = short_names(list(rows))
    shown = ticks(layers)
    axes.set_yticks(shown, [names[i] for i in shown])
    axes.set_xticks(ticks(heads))
    axes.set_xlabel("query head")
    axes.set_ylabel(f"layer\n{pattern}" if pattern else "layer")
    axes.set_title(f"{_in_words(signal)} of every head at step {step}")
    return saved(figure, path)


def _mark_cells(axes: Axes, shown: Any, matrix: np.ndarray, heads: Sequence[int]) -> None:
    """Write values into the cells of a small map, and hatch heads that are not finite."""
    from matplotlib.patches import Rectangle

    for layer, count in enumerate(heads):
        for head in np.flatnonzero(~np.isfinite(matrix[layer, :count])):
            cell = (head - 0.5, layer - 0.5)
            axes.add_patch(Rectangle(cell, 1, 1, fill=False, hatch="xxx", linewidth=0))
    if max(matrix.shape) > _MOST_WRITTEN:
        return
    for layer, head in zip(*np.nonzero(np.isfinite(matrix)), strict=True):
        red, green, blue, _ = shown.cmap(shown.norm(matrix[layer, head]))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "white" if is_dark else "black"
        text = f"{matrix[layer, head]:.2g}"
        axes.text(head, layer, text, ha="center", va="center", fontsize=6, color=colour)


def signal_evolution(
    steps: Sequence[int],
    stats: Sequence[Stats],
    signal: str,
    path: str | Path | None = None,
    *,
    unit: str,
    reduction: Literal["mean", "max"] = "mean",
) -> Figure:
    """Draw one signal of every layer over the steps, reduced over its heads.

    Few layers differ in dash and marker besides colour; many run from dark (first layer) to bright
    (last), and the ends of the highest and the lowest line are named. Heads without a finite value
    are left out; a dotted line marks each step at which a head of some layer stopped being finite.

    Args:
        steps: ``T`` optimizer steps, growing.
        stats: ``T`` measurements; ``stats[t][layer][signal]`` is ``[H]``.
        signal: name of the signal to draw.
        path: file to save to, its format taken from the suffix; None saves nothing.
        unit: unit of the signal.
        reduction: over the heads of a layer: their largest value, or their mean.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no step, or no layer has the signal.
        ImportError: if matplotlib is not installed.

    Example:
        >>> stats = [{"a": {"max_logit": np.array([1.0, value])}} for value in (2.0, 3.0)]
        >>> figure = signal_evolution([1, 2], stats, "max_logit", unit="score", reduction="max")
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0, 3.0]
    """
    if not len(steps):
        raise ValueError(f"no readings to draw {signal!r} from: sample at least one step first")
    _check(signal, (signals for each in stats for signals in each.values()))
    layers = list(
        dict.fromkeys(name for each in stats for name, found in each.items() if signal in found)
    )
    places = np.array(steps)
    values = np.full((len(layers), len(steps)), np.nan)
    counted = np.zeros((len(layers), len(steps)), dtype=int)
    for t, each in enumerate(stats):
        for n, layer in enumerate(layers):
            heads = np.asarray(each.get(layer, {}).get(signal, ()), dtype=np.float64)
            finite = heads[np.isfinite(heads)]
            counted[n, t] = finite.size
            if finite.size:
                values[n, t] = finite.max() if reduction == "max" else finite.mean()
    figure: Figure
    figure, axes = new_axes(8.5, 4.5)
    from matplotlib.ticker import MaxNLocator

    for step in places[1:][(np.diff(counted) < 0).any(axis=0)]:
        axes.axvline(step, color="tab:red", linestyle=":", linewidth=1, zorder=1)
    _draw_layers(axes, places, values, layers)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{'largest head' if reduction == 'max' else 'mean over heads'} ({unit})")
    span = f"step {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    axes.set_title(f"{_in_words(signal)} of every layer, {span}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    return saved(figure, path)


def _draw_layers(axes: Axes, steps: np.ndarray, values: np.ndarray, layers: list[str]) -> None:
    """Draw one line per layer of ``values`` ``[layers, steps]``, and their legend."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    names, pattern = short_names(layers)
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    if len(layers) <= _LEGEND_LAYERS:
        every = -(-len(steps) // 12)
        for name, line, (colour, dash, marker) in zip(names, values, LINES, strict=False):
            axes.plot(
                steps,
                line,
                color=colour,
                linestyle=dash,
                marker=marker,
                markevery=every,
                markersize=4,
                linewidth=1.4,
                label=name,
            )
        axes.legend(
            title=pattern or "layer", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
        )
    else:
        norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
        shown = ticks(len(layers), most=16)
        for line, colour in zip(values, colours, strict=True):
            axes.plot(steps, line, color=colour, linewidth=1.4)
        ends = [(line[-1], name) for line, name in zip(values, names, strict=True)]
        known = sorted(end for end in ends if np.isfinite(end[0]))
        for place, name in {known[0], known[-1]} if known else ():
            axes.annotate(f" {name}", (steps[-1], place), fontsize=8, va="center")
        scale = ScalarMappable(norm, ListedColormap(colours))
        bar = axes.figure.colorbar(scale, ax=axes, label=pattern or "layer")
        bar.set_ticks(shown, labels=[names[i] for i in shown])
        bar.minorticks_off()


def _check(signal: str, layers: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Check that some layer has a value of the signal.

    Raises:
        ValueError: if none has.
    """
    known = {name for signals in layers for name, heads in signals.items() if np.size(heads)}
    if not known:
        raise ValueError(f"no values to draw {signal!r} from: no attention was measured")
    if signal not in known:
        raise ValueError(
            f"no layer has the signal {signal!r}. Measured: {', '.join(sorted(known))}"
        )


def _in_words(signal: str) -> str:
    """Return ``HNF log curvature`` for ``hnf_log_curvature``."""
    words = signal.replace("_", " ").replace("hnf", "HNF")
    return words[:1].upper() + words[1:]
