"""Pictures of signals: every head at one step, and every layer over the steps.

They are drawn on figures of their own, so pyplot's state and the chosen backend stay untouched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stabmon.records import Reading
from stabmon.signals import SIGNALS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND_LAYERS = 8
"""With more layers than this a colour bar stands in for the legend."""


def signal_heatmap(
    stats: Mapping[str, Mapping[str, np.ndarray]],
    signal: str,
    step: int,
    path: str | Path | None = None,
) -> Figure:
    """One signal of every head at one step, layers downwards and heads across; grey where there is
    no finite value.

    Probabilities and shares are drawn on a scale from 0 to 1, so that pictures of several steps
    compare.

    Args:
        stats: ``stats[layer][signal]`` is ``[H]``, one value a query head.
        signal: name of the signal to draw.
        step: the optimizer step, for the title.
        path: where to save the figure, its format taken from the suffix; None to save nothing.

    Raises:
        ValueError: if no layer has the signal.
        ImportError: if matplotlib is not installed.
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
    figure = new_figure(
        width=min(12.0, max(6.0, 3.6 + 0.3 * heads)), height=min(12.0, max(2.6, 1.5 + 0.3 * layers))
    )
    axes = figure.add_subplot()
    share = signal in SIGNALS and SIGNALS[signal].unit.startswith(("probability", "share"))
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        aspect="auto",
        interpolation="nearest",
        vmin=0 if share else None,
        vmax=1 if share else None,
    )
    axes.set_facecolor("0.75")
    figure.colorbar(image, ax=axes, label=_unit(signal))
    names, pattern = short_names(list(rows))
    shown = _ticks(layers)
    axes.set_yticks(shown, [names[i] for i in shown])
    axes.set_xticks(_ticks(heads))
    axes.set_xlabel("query head")
    axes.set_ylabel(f"layer\n{pattern}" if pattern else "layer")
    axes.set_title(f"{_words(signal)} of every head at step {step}")
    return saved(figure, path)


def signal_evolution(
    readings: Sequence[Reading], signal: str, path: str | Path | None = None
) -> Figure:
    """One signal of every layer over the steps: the largest head of a maximum, the mean over heads
    of anything else.

    Lines run from dark (first layer) to bright (last). Heads without a finite value are left out; a
    red dotted line marks a step at which a head of a layer that was finite a reading before is so
    no more.

    Args:
        readings: the readings, oldest first.
        signal: name of the signal to draw.
        path: where to save the figure, its format taken from the suffix; None to save nothing.

    Raises:
        ValueError: if there is no reading, or no reading has the signal.
        ImportError: if matplotlib is not installed.
    """
    if not readings:
        raise ValueError(f"no readings to draw {signal!r} from: sample at least one step first")
    _check(signal, (signals for reading in readings for signals in reading.layers.values()))
    largest = signal in SIGNALS and SIGNALS[signal].reduction == "max"
    layers = list(
        dict.fromkeys(
            name
            for reading in readings
            for name, found in reading.layers.items()
            if signal in found
        )
    )
    steps = np.array([reading.step for reading in readings])
    values = np.full((len(layers), len(readings)), np.nan)
    counted = np.zeros((len(layers), len(readings)), dtype=int)
    for t, reading in enumerate(readings):
        for n, layer in enumerate(layers):
            heads = np.asarray(reading.layers.get(layer, {}).get(signal, ()), dtype=np.float64)
            finite = heads[np.isfinite(heads)]
            counted[n, t] = finite.size
            if finite.size:
                values[n, t] = finite.max() if largest else finite.mean()
    figure = new_figure(width=8.5, height=4.5)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    for step in steps[1:][(np.diff(counted) < 0).any(axis=0)]:
        axes.axvline(step, color="tab:red", linestyle=":", linewidth=1, zorder=1)
    _draw_layers(axes, steps, values, layers)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{'largest head' if largest else 'mean over heads'} ({_unit(signal)})")
    axes.set_title(
        f"{_words(signal)} of every layer, "
        + (f"step {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}")
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    return saved(figure, path)


def short_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """What tells the layers apart, and the pattern that it fills.

    >>> short_names(["model.layers.0.self_attn", "model.layers.1.self_attn"])
    (['0', '1'], 'model.layers.*.self_attn')
    >>> short_names(["encoder.0.attn", "decoder.0.attn"])
    (['encoder', 'decoder'], '*.0.attn')
    >>> short_names(["attn"])
    (['attn'], '')
    """
    parts = [layer.split(".") for layer in layers]
    if len(parts) < 2:
        return list(layers), ""
    shortest = min(len(part) for part in parts)
    head = _shared(parts)
    tail = min(_shared([part[::-1] for part in parts]), shortest - head)
    names = [".".join(part[head : len(part) - tail]) or "·" for part in parts]
    pattern = ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]])
    return names, pattern if pattern != "*" else ""


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many leading parts all have in common."""
    return sum(
        1
        for _ in itertools.takewhile(
            lambda column: len(set(column)) == 1, zip(*parts, strict=False)
        )
    )


def _draw_layers(axes: Axes, steps: np.ndarray, values: np.ndarray, layers: list[str]) -> None:
    """A line a layer, ``values`` being ``[layers, steps]``, and what says which is which."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    names, pattern = short_names(layers)
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    marker = "o" if len(steps) <= 40 else None
    for name, line, colour in zip(names, values, colours, strict=True):
        axes.plot(steps, line, color=colour, label=name, marker=marker, markersize=3, linewidth=1.4)
    if len(layers) <= _LEGEND_LAYERS:
        axes.legend(
            title=pattern or "layer", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
        )
    else:
        norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
        shown = _ticks(len(layers), most=16)
        bar = axes.figure.colorbar(
            ScalarMappable(norm, ListedColormap(colours)), ax=axes, label=pattern or "layer"
        )
        bar.set_ticks(shown, labels=[names[i] for i in shown])
        bar.minorticks_off()


def _check(signal: str, layers: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Raises ValueError where no layer has a value of the signal."""
    known = {name for signals in layers for name, heads in signals.items() if np.size(heads)}
    if not known:
        raise ValueError(f"no values to draw {signal!r} from: no attention was measured")
    if signal not in known:
        raise ValueError(
            f"no layer has the signal {signal!r}. Measured: {', '.join(sorted(known))}"
        )


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that pyplot knows nothing of; sizes in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "stabmon[report]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, saved where a path is given."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _words(signal: str) -> str:
    """``hnf_log_curvature`` as ``HNF log curvature``."""
    words = signal.replace("_", " ").replace("hnf", "HNF")
    return words[:1].upper() + words[1:]


def _unit(signal: str) -> str:
    """The signal's unit; its own name where nobody registered it."""
    return SIGNALS[signal].unit if signal in SIGNALS else signal


def _ticks(count: int, most: int = 32) -> list[int]:
    """At most ``most`` of the places 0 … count - 1, evenly apart."""
    return list(range(0, count, -(-count // most)))
