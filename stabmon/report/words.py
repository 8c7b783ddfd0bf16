"""Words of analysis pages on their records: tokens, arrays by layer, facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.report.numbers import number
from stabmon.report.page import Finding


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
