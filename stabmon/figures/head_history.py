"""Every head now and over the run: the newest matrix beside the history of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import quiet_glyphs, require, saved, unlaid_figure
from stabmon.figures.labels import drawable, short_names, ticks

MOST_COLUMNS = 400
"""Columns of a drawn history; a longer run is drawn at evenly spaced steps."""
_SEPARATED = 16
"""Layers up to which a line separates them in the history."""
_GREY = (184, 184, 184)
_MARKS = {"alarm": ("v", "#C00000"), "intervention": ("^", "#0050A0")}
"""Sign and colour of the steps marked above a history."""


@dataclass(frozen=True)
class Scale:
    """Colour scale: its ends, and the value above which it is logarithmic."""

    low: float
    high: float
    log_above: float | None = None
    """None for a linear scale."""


@dataclass(frozen=True)
class HeadHistory:
    """One signal of every head over the run."""

    name: str
    """Title of the panels."""
    unit: str
    steps: Sequence[int]
    """``T`` optimizer steps, growing."""
    values: np.ndarray
    """``[T, layers, heads]``; NaN where a layer has fewer heads or nothing was measured."""
    scale: Scale
    hint: str = ""
    """Meaning of high or low values, in a few words."""
    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Steps to mark, by ``alarm`` or ``intervention``."""


def head_history(
    signals: Sequence[HeadHistory],
    layers: Sequence[str],
    *,
    width: float = 9.6,
    path: str | Path | None = None,
) -> Any:
    """Draw signals of every head, one below the other: newest matrix left, history right.

    The matrix has layers downwards and heads across. The history has one row per head, layer by
    layer, and columns evenly spaced over the steps, each showing the newest measurement at its
    step. Heads without a number are grey.

    Args:
        signals: the signals, of the same layers.
        layers: the layers' names.
        width: width of the figure in inches; each signal is half as high.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: for no signals, or one without a step.
        ImportError: if matplotlib is not installed.

    Example:
        >>> values = np.ones((2, 1, 4))
        >>> signal = HeadHistory("Entropy", "nats", [1, 5], values, Scale(0.0, 2.0))
        >>> [axes.get_xlabel() for axes in head_history([signal], ["h.0"]).axes[:2]]
        ['query head', 'optimizer step']
    """
    require(signals, "signals")
    high = width / 2 * len(signals)
    figure = unlaid_figure(width, high)
    names, pattern = short_names([drawable(layer) for layer in layers])
    for place, signal in enumerate(signals):
        require(signal.steps, f"steps of {signal.name!r}")
        panel = _Panel(figure, width, high, place)
        _draw_matrix(panel, signal, names, pattern)
        _draw_history(panel, signal, names)
        _draw_bar(panel, signal)
        panel.title(signal)
    return saved(figure, path)


def pixels(figure: Any, dots: float = 100.0) -> np.ndarray:
    """Return a figure as pixels.

    Args:
        figure: matplotlib's figure.
        dots: dots per inch.

    Returns:
        uint8 ``[height, width, 3]``, red, green and blue.

    Example:
        >>> pixels(unlaid_figure(2.0, 1.0), dots=50).shape
        (50, 100, 3)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dots)
    canvas: Any = FigureCanvasAgg(figure)
    with quiet_glyphs():
        canvas.draw()
    drawn: np.ndarray = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return drawn


class _Panel:
    """The places of one signal's axes, set by hand: a layout engine takes twice the time."""

    def __init__(self, figure: Any, width: float, high: float, place: int) -> None:
        self.figure, self._width, self._high = figure, width, high
        self._top = high - place * width / 2
        self._bottom = self._top - width / 2 + 0.62
        self.matrix = self._axes(0.85, 2.35)
        self.history = self._axes(4.05, width - 5.35)
        self.bar = self._axes(width - 1.12, 0.16)

    def _axes(self, left: float, width: float) -> Any:
        box = (left, self._bottom, width, self._top - 0.95 - self._bottom)
        whole = (self._width, self._high) * 2
        return self.figure.add_axes(tuple(np.divide(box, whole)))

    def title(self, signal: HeadHistory) -> None:
        """Write the signal's name, newest step and hint above its axes."""
        title = f"{signal.name} of every head, step {signal.steps[-1]}"
        for words, below, size in ((title, 0.12, 13), (signal.hint, 0.4, 11)):
            self.figure.text(
                0.25 / self._width,
                (self._top - below) / self._high,
                drawable(words),
                va="top",
                fontsize=size,
                parse_math=False,
            )


def _draw_matrix(panel: _Panel, signal: HeadHistory, names: Sequence[str], pattern: str) -> None:
    """Draw the newest ``[layers, heads]``."""
    axes, newest = panel.matrix, signal.values[-1]
    _image(axes, newest, signal.scale, (-0.5, newest.shape[1] - 0.5, newest.shape[0] - 0.5, -0.5))
    rows = ticks(newest.shape[0], 8)
    axes.set_yticks(rows, [names[row] for row in rows])
    axes.set_xticks(ticks(newest.shape[1], 8))
    axes.set_xlabel("query head")
    axes.set_ylabel(f"layer ({pattern})" if pattern else "layer", parse_math=False)
    axes.set_title("now", fontsize=11)


def _draw_history(panel: _Panel, signal: HeadHistory, names: Sequence[str]) -> None:
    """Draw one row per head and one column per step, marked steps above."""
    from matplotlib.ticker import MaxNLocator

    axes = panel.history
    count, layers, heads = signal.values.shape
    steps = np.asarray(signal.steps, dtype=np.float64)
    span = float(steps[-1] - steps[0])
    columns = np.linspace(steps[0], steps[-1], min(MOST_COLUMNS, int(span) + 1))
    newest = np.searchsorted(steps, columns + 1e-9 * span, side="right") - 1
    half = span / (len(columns) - 1) / 2 if len(columns) > 1 else 0.5
    ends = float(columns[0]) - half, float(columns[-1]) + half
    rows = signal.values.reshape(count, layers * heads).T[:, newest]
    _image(axes, rows, signal.scale, (*ends, layers * heads - 0.5, -0.5))
    if layers <= _SEPARATED:
        axes.hlines(
            np.arange(1, layers) * heads - 0.5, *ends, colors="white", linewidth=0.6, alpha=0.7
        )
    places = ticks(layers, 8)
    axes.set_yticks([(place + 0.5) * heads - 0.5 for place in places], [names[i] for i in places])
    axes.set_ylabel("layer, and in each its heads" if heads > 1 else "layer")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlim(*ends)
    marked = {
        kind: [max(at, steps[0]) for at in signal.marks.get(kind, ()) if at <= columns[-1]]
        for kind in _MARKS
    }
    for kind, (sign, colour) in _MARKS.items():
        if marked[kind]:
            _mark(axes, kind, marked[kind], sign, colour)
    axes.set_title("over the run", fontsize=11, loc="left", pad=18 if any(marked.values()) else 6)
    if any(marked.values()):
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.045),
            ncols=len(_MARKS),
            frameon=False,
            fontsize=10,
            handletextpad=0.1,
            borderaxespad=0.0,
        )


def _mark(axes: Any, kind: str, steps: Sequence[int], sign: str, colour: str) -> None:
    """Draw signs above some steps, and dotted lines through them."""
    across = axes.get_xaxis_transform()
    axes.plot(
        steps,
        [1.03] * len(steps),
        sign,
        color=colour,
        markersize=7,
        clip_on=False,
        transform=across,
        label=kind,
    )
    axes.vlines(steps, 0, 1, color="white", linewidth=0.9, linestyles=":", transform=across)


def _draw_bar(panel: _Panel, signal: HeadHistory) -> None:
    """Draw the colour bar."""
    axes, scale = panel.bar, signal.scale
    axes.imshow(
        _colours(np.linspace(0.0, 1.0, 128)[:, None]),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0.0, 1.0, 0.0, 1.0),
    )
    if scale.log_above is None:
        values = np.linspace(scale.low, scale.high, 6)
    else:
        decades = round(np.log10(scale.high / scale.log_above))
        values = np.array([scale.low, *scale.log_above * 10.0 ** np.arange(decades + 1)])
    axes.set_xticks([])
    axes.set_yticks(_share(values, scale), [f"{value:.4g}" for value in values])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(signal.unit, parse_math=False)


def _image(
    axes: Any, values: np.ndarray, scale: Scale, extent: tuple[float, float, float, float]
) -> None:
    """Draw a matrix in exact cells, NaN and infinities grey.

    The colours are looked up here: matplotlib's own norm and colour bar take as long as all else.
    """
    colours = _colours(_share(values, scale))
    colours[~np.isfinite(values)] = _GREY
    axes.imshow(colours, aspect="auto", interpolation="nearest", extent=extent)


def _share(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the places of values on a scale, from 0 to 1."""
    low, high = scale.low, scale.high
    clipped = np.clip(np.nan_to_num(values), low, high)
    if scale.log_above is None:
        shares: np.ndarray = (clipped - low) / (high - low)
        return shares
    start = scale.log_above
    # a decade as long as the linear part
    placed = np.where(
        clipped > start,
        1.0 + np.log10(np.maximum(clipped, start) / start),
        (clipped - low) / (start - low),
    )
    logarithmic: np.ndarray = placed / (1.0 + np.log10(high / start))
    return logarithmic


def _colours(shares: np.ndarray) -> np.ndarray:
    """Return viridis colours of places from 0 to 1, ``[..., 3]`` uint8."""
    from matplotlib import colormaps

    colours: np.ndarray = np.asarray(colormaps["viridis"](shares, bytes=True))[..., :3].copy()
    return colours
