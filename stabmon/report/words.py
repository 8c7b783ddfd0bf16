"""Numbers, layers and tokens in words, for pages of all kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures.labels import short_names
from stabmon.report.page import Finding


def short_layers(layers: Sequence[str]) -> tuple[list[str], str]:
    """Shorten layer names to the parts in which they differ.

    Returns:
        The short names, and a sentence on their meaning; empty if nothing was cut.

    Example:
        >>> short_layers(["h.0.attn", "h.1.attn"])
        (['0', '1'], 'Layer 0 stands for h.0.attn, and so on.')
    """
    names, pattern = short_names(list(layers))
    if not pattern or len(set(names)) < len(names):
        return list(layers), ""
    return names, f"Layer {names[0]} stands for {layers[0]}, and so on."


def map_names(layers: Sequence[str]) -> list[str]:
    """Return the layers' names for the map's selector.

    >>> map_names(["h.0.attn", "h.1.attn"])
    ['layer 0', 'layer 1']
    """
    names, meaning = short_layers(layers)
    return [f"layer {name}" for name in names] if meaning else names


def number(value: Any, digits: int = 3) -> str:
    """Return a number for readers; ``–`` for NaN and None.

    >>> number(0.12345), number(float("nan")), number(7), number(float("inf"))
    ('0.123', '–', '7', '∞')
    """
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return ("∞" if value > 0 else "-∞") if np.isinf(value) else f"{value:.{digits}g}"
    return str(value)


def percent(value: float) -> str:
    """Return a share in per cent.

    >>> percent(0.123), percent(0.0004), percent(float("nan"))
    ('12%', '0.04%', '–')
    """
    if np.isnan(value):
        return "–"
    return f"{value:.0%}" if value >= 0.095 or value == 0 else f"{100 * value:.2g}%"


def plural(count: int, word: str) -> str:
    """Return a count and its noun.

    >>> plural(1, "layer"), plural(1200, "head")
    ('1 layer', '1,200 heads')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def tokens_of(record: AnalysisRecord, sample: int = 0) -> list[str] | None:
    """Return a sample's stored tokens, or None."""
    tokens = record.values.get("tokens")
    if not tokens or sample >= len(tokens):
        return None
    return [str(token) for token in tokens[sample]]


def fitting(tokens: list[str] | None, count: int) -> list[str] | None:
    """Return the tokens if there is one per position, else None."""
    return tokens if tokens is not None and len(tokens) == count else None


def by_layer(record: AnalysisRecord, group: str) -> dict[str, np.ndarray]:
    """Return the arrays ``<group>/<layer>`` in the order of ``values["layers"]``."""
    found = {
        name.removeprefix(f"{group}/"): array
        for name, array in record.arrays.items()
        if name.startswith(f"{group}/")
    }
    order = [layer for layer in record.values.get("layers", ()) if layer in found]
    return {layer: found[layer] for layer in order} | found


def mean_of(values: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Return the mean of the finite values; NaN where there is none."""
    values = np.asarray(values, dtype=np.float64)
    counted = np.isfinite(values)
    total = np.where(counted, values, 0.0).sum(axis)
    many = counted.sum(axis)
    mean: np.ndarray = np.where(many > 0, total / np.maximum(many, 1), np.nan)
    return mean


def stacked(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Stack one-dimensional arrays, padding shorter ones with NaN."""
    kept = [np.asarray(row, dtype=np.float64) for row in rows]
    matrix = np.full((len(kept), max((len(row) for row in kept), default=0)), np.nan)
    for place, row in zip(matrix, kept, strict=True):
        place[: len(row)] = row
    return matrix


def non_finite(arrays: Mapping[str, np.ndarray]) -> list[Finding]:
    """Return a finding if the attention of some layers is NaN or infinite."""
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if not bad:
        return []
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    text = (
        f"Attention is not finite in {', '.join(bad[:4])}{more}: weights or activations are NaN or "
        "infinite, and nothing below can be trusted there. Run stabmon check on the model."
    )
    return [Finding("error", "non_finite", text)]


def common_facts(record: AnalysisRecord) -> list[tuple[str, str]]:
    """Return name and value of model, input and command, as far as stored."""
    values = record.values
    facts = []
    for name in ("model", "input", "samples", "length", "command", "seconds"):
        if values.get(name) not in (None, ""):
            facts.append((name, number(values[name], 4)))
    return facts
