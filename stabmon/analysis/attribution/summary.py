"""Summary of one layer's attention and the rollout of all layers in eight numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.analysis.chunks import part_of
from stabmon.analysis.rollout.api import check_residual
from stabmon.analysis.rollout.mixing import Observer
from stabmon.analysis.rollout.result import Rollout
from stabmon.analysis.rollout.run import roll_model, sample_dimension
from stabmon.analysis.rollout.stack_walk import Settings, seen_calls
from stabmon.analysis.rollout.stacks import choose, stacks_of

MEASURED = (
    "mean_attention",
    "max_attention",
    "attention_entropy",
    "attention_concentration",
    "rollout_max",
    "rollout_entropy",
)
"""Keys of the measured numbers; batch_size and seq_length are the batch's own."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def compute_attention_attribution(
    model: nn.Module,
    input_batch: Any,
    layer_idx: int = -1,
    attention_layer_pattern: str | None = None,
    *,
    stack: str | None = None,
    residual: float = 0.5,
    chunk_size: int | None = None,
) -> dict[str, float | int]:
    """Summarize the attention of one layer and the rollout of all in eight numbers.

    Rows are the queries that see a key and are no padding; a row's weights are a_1 … a_S in [0, 1].

    Args:
        model: any model with captured attention.
        input_batch: its input, as in :func:`stabmon.analysis.forward.run_model`.
        layer_idx: index of the layer for the attention; negative ones count from the last.
        attention_layer_pattern: regular expression that a layer's name must contain.
        stack, residual, chunk_size: see :func:`stabmon.analysis.rollout.api.attention_rollout`.

    Returns:
        mean_attention: mean over heads, rows and all S keys. As a row sums to 1 it is 1/S whatever
            the model does (less only beside a learned sink); kept for comparison with earlier
            tools, and uninformative.
        max_attention: the largest weight.
        attention_entropy: mean over heads and rows of -sum a ln a, in nats, from 0 to ln S.
        attention_concentration: mean over heads and rows of the row's largest weight, from 1/S to
            1.
        rollout_max: the largest entry of the rollout; 1 under a causal mask, by the first token.
        rollout_entropy: mean over rows of the rollout of -sum r ln r, in nats.
        batch_size, seq_length: samples, and tokens of the stack.
        Numbers are NaN where the model is NaN; nothing is clamped.

    Raises:
        ValueError: for a layer index out of range, and as ``attention_rollout``.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
        >>> found = compute_attention_attribution(model, torch.randn(2, 5, 8))
        >>> round(found["mean_attention"], 6), found["batch_size"], found["seq_length"]
        (0.2, 2, 5)

    References:
        Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers.
    """
    settings = Settings(check_residual(residual), stack=stack, pattern=attention_layer_pattern)
    return attribution_of(model, input_batch, layer_idx, settings, chunk_size)[0]


def attribution_of(
    model: nn.Module, batch: Any, layer_idx: int, settings: Settings, chunk_size: int | None = None
) -> tuple[dict[str, float | int], Rollout]:
    """Return the eight numbers and their rollout.

    Args:
        model, batch, layer_idx, chunk_size: see :func:`compute_attention_attribution`.
        settings: settings of the rollout, without targets.
    """
    names = layers_of(model, batch, settings)
    if not -len(names) <= layer_idx < len(names):
        raise ValueError(
            f"layer_idx {layer_idx!r}: there are {len(names)} layers, 0 to {len(names) - 1}: "
            f"{', '.join(names)}"
        )
    found: dict[int, RowSums] = {}

    def observer(layer: str, sample: int, valid: Tensor) -> Observer | None:
        if layer != names[layer_idx]:
            return None
        found[sample] = RowSums(valid)
        return found[sample].add

    rollout = roll_model(model, batch, settings, chunk_size=chunk_size, observers=observer)
    rows = rollout.matrix[rollout.valid]
    result: dict[str, float | int] = dict(
        zip(MEASURED, (*merged(found.values()), *of_rollout(rows)), strict=True)
    )
    return {
        **result,
        "batch_size": len(rollout.matrix),
        "seq_length": rollout.matrix.shape[1],
    }, rollout


def layers_of(model: nn.Module, batch: Any, settings: Settings) -> list[str]:
    """Return the layers of the stack to roll out.

    Found by a forward of the first sample; by one of the whole batch if it cannot be divided.

    Args:
        model, batch: see :func:`compute_attention_attribution`.
        settings: settings of the rollout.
    """
    try:
        first = part_of(batch, 0, 1, sample_dimension(model))
        seen = seen_calls(model, first, settings)
    except (ValueError, RuntimeError, IndexError):
        seen = seen_calls(model, batch, settings)
    if settings.stack is None:
        own = [call for call in seen if call.kind == "self"]
        return [call.layer for call in own if call.prefix == own[-1].prefix]
    chosen = choose(seen, settings.stack)
    if chosen is not None:
        return chosen[0].layers
    return [layer for each in stacks_of(seen) for layer in each.layers]


@dataclass
class RowSums:
    """Sums over the valid rows of one sample's layer."""

    valid: Tensor
    """``[Q]`` bool."""
    rows: int = 0
    """Number of rows times heads."""
    keys: int = 0
    total: float = 0.0
    entropy: float = 0.0
    largest: float = 0.0
    """Sum of the rows' largest weights."""
    peak: float = -math.inf
    parts: list[Tensor] = field(default_factory=list)

    def add(self, weights: Tensor, rows: slice) -> None:
        """Add the weights ``[H, rows, cols]`` of some rows.

        Args:
            weights: ``[H, rows, cols]``.
            rows: the query rows.
        """
        own = self.valid[rows]
        self.keys = max(self.keys, len(self.valid))
        if not weights.shape[-1]:
            return
        tops = weights.amax(-1)[:, own]
        entropy = torch.special.entr(weights).sum(-1)[:, own]
        total = weights.sum(-1)[:, own]
        self.rows += tops.numel()
        if tops.numel():
            wide = [each.double().sum() for each in (total, entropy, tops)]
            self.parts.append(torch.stack([*wide, tops.double().amax()]))

    def close(self) -> RowSums:
        """Copy the sums to the host, once per sample."""
        if self.parts:
            stacked = torch.stack(self.parts)
            self.total, self.entropy, self.largest = (
                float(value) for value in stacked[:, :3].sum(0)
            )
            self.peak = float(stacked[:, 3].amax())
            self.parts = []
        return self


def merged(sums: Iterable[RowSums]) -> tuple[float, float, float, float]:
    """Return mean and largest weight, mean entropy and mean of the rows' maxima."""
    closed = [each.close() for each in sums]
    rows = sum(each.rows for each in closed)
    if rows == 0:
        return (math.nan,) * 4
    entries = sum(each.rows * each.keys for each in closed)
    peaks = [each.peak for each in closed if each.rows]
    peak = math.nan if any(math.isnan(each) for each in peaks) else max(peaks)
    total, entropy, largest = (_sum(closed, name) for name in ("total", "entropy", "largest"))
    return total / entries, peak, entropy / rows, largest / rows


def _sum(sums: Iterable[RowSums], name: str) -> float:
    """Return the exact sum of a field, NaN if any term is not finite."""
    terms = [getattr(each, name) for each in sums]
    return math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan


def of_rollout(rows: Tensor) -> tuple[float, float]:
    """Return the largest entry and the mean entropy of a rollout's rows ``[n, S]``.

    NaN without rows.
    """
    if not len(rows):
        return math.nan, math.nan
    entropies = [torch.special.entr(part).sum(-1) for part in rows.split(1024)]
    return float(rows.amax()), float(torch.cat(entropies).double().mean())


@dataclass(frozen=True)
class AttributionSummary:
    """The eight numbers over the batches of a loader.

    Attributes:
        n: number of samples.
        batches: numbers of each batch, in order.
        mean, std: by key, weighted by samples; std over batches with n - 1, NaN for one batch.
        quantiles: by key, ``{q: value}`` over batches.

    Example:
        >>> AttributionSummary(2, ({"rollout_max": 1.0},), {"rollout_max": 1.0}, {}, {}).mean
        {'rollout_max': 1.0}
    """

    n: int
    batches: tuple[Mapping[str, float | int], ...]
    mean: Mapping[str, float]
    std: Mapping[str, float]
    quantiles: Mapping[str, Mapping[float, float]]


def aggregate_attribution(
    model: nn.Module,
    loader: Iterable[Any],
    layer_idx: int = -1,
    attention_layer_pattern: str | None = None,
    *,
    stack: str | None = None,
    max_batches: int | None = None,
) -> AttributionSummary:
    """Summarize attention and rollout over the batches of a loader.

    Args:
        model: any model with captured attention.
        loader: its batches; labels beside the input must be left out, unless the model takes them.
        layer_idx, attention_layer_pattern, stack: see :func:`compute_attention_attribution`.
        max_batches: largest number of batches; None for all.

    Returns:
        Mean, standard deviation and quantiles of each of the six measured keys.

    Raises:
        ValueError: if the loader has no batch, and as ``compute_attention_attribution``.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
        >>> summary = aggregate_attribution(model, [torch.randn(2, 5, 8), torch.randn(1, 5, 8)])
        >>> summary.n, sorted(summary.quantiles["rollout_entropy"])
        (3, [0.05, 0.25, 0.5, 0.75, 0.95])
    """
    found: list[dict[str, float | int]] = []
    for index, batch in enumerate(loader):
        if max_batches is not None and index >= max_batches:
            break
        found.append(
            compute_attention_attribution(
                model, batch, layer_idx, attention_layer_pattern, stack=stack
            )
        )
    if not found:
        raise ValueError("the loader gave no batch: nothing to aggregate")
    weights = np.array([each["batch_size"] for each in found], dtype=np.float64)
    mean, std, quantiles = {}, {}, {}
    for key in MEASURED:
        values = np.array([each[key] for each in found], dtype=np.float64)
        mean[key] = float(np.average(values, weights=weights))
        std[key] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        quantiles[key] = {
            q: float(value)
            for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
        }
    return AttributionSummary(int(weights.sum()), tuple(found), mean, std, quantiles)
