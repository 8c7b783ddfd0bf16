"""Pack the signals of all heads into a page.

Values are whole numbers of 16 bits between the smallest and the largest value of a signal over all
runs, gzip and base64 around them; a signal that spans many powers of ten is packed by its inverse
hyperbolic sine. Samples are joined to at most 400 columns of their smallest and largest value, in
which the samples around incidents and interventions stand alone.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from stabmon.report.numbers import map_names
from stabmon.report.run.loading import Run
from stabmon.report.run.signals import columns, extremes, title_of
from stabmon.report.run.spans import incident_spans, issue_spans
from stabmon.report.run.timeline import losses_of, rates_of
from stabmon.signals.presentation import presentation_of

COLUMNS = 400
"""Most columns of a run."""
FEWEST = 40
"""Fewest columns of a run that has as many samples."""
CODES = 2_460_000
"""Numbers of 16 bits in a page: 24 layers of 16 heads, 400 columns, 8 signals, 2 extremes."""
AROUND = 2
"""Samples before and after an event that stand alone."""
TOP, NEGATIVE, POSITIVE, MISSING = 65_532, 65_533, 65_534, 65_535
"""Largest code of a finite value, and the codes of -inf, inf and NaN."""
WIDE = 300.0
"""Ratio of the largest to the median magnitude from which a signal is packed by asinh."""
SPANS = 20_000
"""Issues that the maps mark; the tables have all."""


def packed(runs: Sequence[Run]) -> dict[str, Any]:
    """Pack the signals of runs for the page's script.

    Args:
        runs: the runs of the page.

    Returns:
        For the template: ``meta`` (JSON) and ``data`` (base64).
    """
    heads = sum(run.signals.heads for run in runs)
    most = max(FEWEST, min(COLUMNS, CODES // max(1, heads * 4 * 2)))
    starts = [_starts(run, most) for run in runs]
    names = list(dict.fromkeys(name for run in runs for name in run.signals.names))
    size = sum(
        run.signals.heads * len(start) * _planes(run, start)
        for run, start in zip(runs, starts, strict=True)
    )
    names = names[: max(4, CODES // max(1, size))]
    scales = {
        name: _scale([run.signals.values[name] for run in runs if name in run.signals.values])
        for name in names
    }
    raw, described = [], []
    for run, start in zip(runs, starts, strict=True):
        own = [name for name in names if name in run.signals.values]
        for name in own:
            planes = extremes(run.signals.values[name], start)
            for plane in planes[: _planes(run, start)]:
                raw.append(_codes(plane, *scales[name]).T.tobytes())
        described.append(_described(run, start, own))
    meta = {
        "runs": described,
        "signals": {
            name: {
                "title": title_of(name),
                "unit": presentation_of(name).unit,
                "worst": "high" if presentation_of(name).reduction == "max" else "low",
                "limits": list(presentation_of(name).limits),
                "low": scales[name][0],
                "high": scales[name][1],
                "soft": scales[name][2],
            }
            for name in names
        },
        "top": TOP,
    }
    return {"meta": meta, "data": base64.b64encode(_gzip(b"".join(raw))).decode()}


def _described(run: Run, start: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return what the script must know of a run."""
    signals = run.signals
    layers = [layer for layer, _ in signals.layers]
    losses, rates = losses_of(run), rates_of(run)
    return {
        "letter": run.letter,
        "name": run.name,
        "unit": run.unit,
        "first": run.first_step,
        "last": run.last_step,
        "from": [int(step) for step in signals.steps[start]],
        "steps": [int(step) for step in signals.steps[_ends(start, len(signals.steps))]],
        "planes": _planes(run, start),
        "layers": [
            {"name": name, "short": short, "heads": heads}
            for (name, heads), short in zip(signals.layers, map_names(layers), strict=True)
        ],
        "signals": list(names),
        "loss": _thinned(*losses),
        "rate": _thinned(rates[0], rates[2]),
        "issues": _spans(run, layers),
        "incidents": [
            [each.start, each.end, each.severity, each.incident.title]
            for each in incident_spans(run)
        ],
    }


def _spans(run: Run, layers: Sequence[str]) -> list[list[Any]]:
    """Return layer, head (-1 for all), first step, last step, severity, type of each issue."""
    place = {name: at for at, name in enumerate(layers)}
    found = []
    for span in issue_spans(run.records.issues)[:SPANS]:
        issue = span.issue
        layer = _layer_of(issue.layer, place)
        if layer is not None:
            head = -1 if issue.head is None else issue.head
            found.append([layer, head, issue.step, span.end, span.severity, issue.issue_type])
    return found


def _layer_of(name: str | None, place: dict[str, int]) -> int | None:
    """Return the layer that a module is, or lies in."""
    while name:
        if name in place:
            return place[name]
        name = name.rpartition(".")[0]
    return None


def _starts(run: Run, most: int) -> np.ndarray:
    """Return the first sample of each column."""
    steps = run.signals.steps
    events = [
        step for each in incident_spans(run) for step in (each.start, each.end) if step is not None
    ]
    events += [int(each.get("step", 0)) for each in run.records.interventions]
    near = [
        at
        for event in dict.fromkeys(events)
        for middle in [int(np.searchsorted(steps, event))]
        for at in range(middle - AROUND, middle + AROUND + 1)
    ]
    return columns(len(steps), list(dict.fromkeys(near)), most)


def _planes(run: Run, start: np.ndarray) -> int:
    """Return 1 where each column is one sample, else 2 for smallest and largest."""
    return 1 if len(start) == len(run.signals.steps) else 2


def _ends(start: np.ndarray, count: int) -> np.ndarray:
    """Return the last sample of each column."""
    return np.append(start[1:], count)[: len(start)] - 1


def _scale(arrays: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the smallest and largest value, and the width of asinh's linear part; 0 for none."""
    finite = np.concatenate([each[np.isfinite(each)] for each in arrays]).astype(np.float64)
    if not finite.size:
        return 0.0, 1.0, 0.0
    low, high = float(finite.min()), float(finite.max())
    middle = float(np.median(np.abs(finite)))
    largest = max(abs(low), abs(high))
    soft = middle if middle > 0 and largest > WIDE * middle else 0.0
    return low, high if high > low else low + 1.0, soft


def _codes(values: np.ndarray, low: float, high: float, soft: float) -> np.ndarray:
    """Return the codes ``[C, N]`` of values."""
    given = values.astype(np.float64)
    finite = np.isfinite(given)
    shown = np.where(finite, given, low)
    if soft:
        bottom, top = math.asinh(low / soft), math.asinh(high / soft)
        share = (np.arcsinh(shown / soft) - bottom) / (top - bottom)
    else:
        share = (shown - low) / (high - low)
    codes = np.rint(np.clip(share, 0, 1) * TOP)
    codes[np.isnan(given)] = MISSING
    codes[np.isposinf(given)] = POSITIVE
    codes[np.isneginf(given)] = NEGATIVE
    coded: np.ndarray = codes.astype("<u2")
    return coded


def _thinned(steps: np.ndarray, values: np.ndarray, most: int = 800) -> list[list[float | None]]:
    """Return at most ``most`` pairs of step and value; None for a value that is not finite."""
    chosen = slice(None, None, -(-len(steps) // most) or 1)
    return [
        [int(step), float(f"{value:.6g}") if math.isfinite(value) else None]
        for step, value in zip(steps[chosen].tolist(), values[chosen].tolist(), strict=True)
    ]


def _gzip(raw: bytes) -> bytes:
    """Compress by gzip without a time stamp, so that equal numbers give equal pages."""
    packer = zlib.compressobj(9 if len(raw) < 2_000_000 else 6, zlib.DEFLATED, 31)
    return packer.compress(raw) + packer.flush()
