"""Charts of curvature, precision and controllers, and of several runs in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from stabmon._torch.number_formats import MANTISSA_BITS, bits_averaged
from stabmon.records import LayerInfo
from stabmon.report.run.axes import scale_of
from stabmon.report.run.charts import Panel, curve, panels
from stabmon.report.run.loading import Run
from stabmon.report.run.signals import CONTROLLERS, title_of
from stabmon.report.run.timeline import losses_of
from stabmon.signals.presentation import presentation_of

Reduce = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Chart:
    """A figure with its heading."""

    name: str
    """Name for its file."""
    title: str
    drawing: Markup
    text: str = ""
    """Meaning of the curve for a reader."""


def curvature_chart(runs: Sequence[Run], span: tuple[float, float]) -> Chart | None:
    """Draw the tight and the loose bound of the curvature over all heads."""
    parts = [
        ("hnf_log_curvature", "tight bound: largest ln curvature of any head", _largest),
        ("hnf_log_curvature_bound", "loose bound, from the range of scores alone", _largest),
    ]
    drawing = _stack(runs, span, parts)
    text = (
        "Natural logarithm of a bound on the curvature of the attention map. A head whose curvature "
        "runs away can no longer follow the gradient."
    )
    return Chart("curvature", "Curvature", drawing, text) if drawing else None


def precision_chart(runs: Sequence[Run], span: tuple[float, float]) -> Chart | None:
    """Draw the bits that scores need, beside those that the number format has."""
    infos = [
        info
        for run in runs
        for reading in run.records.readings[-1:]
        for info in reading.info.values()
    ]
    levels = {
        (MANTISSA_BITS[info.dtype] + _averaged(info), f"{info.dtype} keeps")
        for info in infos
        if info.dtype in MANTISSA_BITS
    }
    parts = [("precision_bits", "bits needed by the head that needs most", _largest)]
    drawing = _stack(runs, span, parts, sorted(levels))
    text = (
        "Mantissa bits that keep the largest score's rounding from changing the attention, beside "
        "those that the format of queries and keys keeps, with what a fused kernel gains by "
        "accumulating in float32."
    )
    return Chart("precision", "Precision", drawing, text) if drawing else None


def controller_chart(runs: Sequence[Run], span: tuple[float, float]) -> Chart | None:
    """Draw the effect of attention controllers, mean over heads and largest."""
    parts: list[tuple[str, str, Reduce]] = []
    for name in CONTROLLERS:
        parts.append((name, f"{title_of(name)}: mean over heads", _mean))
        if name == "controller_kl":
            parts.append((name, f"{title_of(name)}: largest of any head", _largest))
    drawing = _stack(runs, span, parts)
    text = (
        "How far the controllers move attention: KL in nats, mean gain of the queries, mean "
        "absolute bias of the keys in nats."
    )
    return Chart("controllers", "Controllers", drawing, text) if drawing else None


def comparison_chart(runs: Sequence[Run], span: tuple[float, float]) -> Chart | None:
    """Draw losses and worst heads of several runs on the same axes."""
    if len(runs) < 2:
        return None
    losses = [losses_of(run) for run in runs]
    entropy = runs[0].signals.entropy
    plots = []
    if any(len(steps) for steps, _ in losses):
        curves = [
            curve(steps, values, run.letter, at)
            for at, (run, (steps, values)) in enumerate(zip(runs, losses, strict=True))
            if len(steps)
        ]
        plots.append(Panel("loss", curves, scale_of([values for _, values in losses]), 150))
    plots += _plots(
        runs,
        [
            ("max_logit", "largest score of any head", _largest),
            (entropy, f"lowest {title_of(entropy)} of any head", _smallest),
        ],
    )
    label = "Losses and worst heads of the runs over the same steps"
    return Chart("comparison", "On the same axes", panels(plots, span, label)) if plots else None


def _stack(
    runs: Sequence[Run],
    span: tuple[float, float],
    parts: Sequence[tuple[str, str, Reduce]],
    levels: Sequence[tuple[float, str]] = (),
) -> Markup:
    plots = _plots(runs, parts, levels)
    if not plots:
        return Markup()
    return panels(plots, span, "; ".join(plot.title for plot in plots), runs[0].unit)


def _plots(
    runs: Sequence[Run],
    parts: Sequence[tuple[str, str, Reduce]],
    levels: Sequence[tuple[float, str]] = (),
) -> list[Panel]:
    plots = []
    for name, title, reduce in parts:
        curves, arrays = [], []
        for at, run in enumerate(runs):
            values = run.signals.values.get(name)
            if values is None or not np.isfinite(values).any():
                continue
            over_heads = reduce(np.where(np.isfinite(values), values, np.nan))
            letter = run.letter if len(runs) > 1 else ""
            curves.append(curve(run.signals.steps, over_heads, letter, at))
            arrays.append(over_heads)
        if curves:
            arrays += [np.array([value for value, _ in levels])] if levels else []
            limits = presentation_of(name).limits
            plots.append(Panel(title, curves, scale_of(arrays, limits), 110, levels))
    return plots


def _averaged(info: LayerInfo) -> float:
    """Return the bits that a fused kernel gains by accumulating in float32."""
    return bits_averaged(info.head_dim) if info.fused else 0.0


def _largest(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.fmax.reduce(values, axis=1)
    return found


def _smallest(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.fmin.reduce(values, axis=1)
    return found


def _mean(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=1)
    found: np.ndarray = np.where(
        known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan
    )
    return found
