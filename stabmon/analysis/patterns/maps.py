"""Attention maps for pictures, exact or pooled to a limited size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabmon.analysis.dtypes import compute_dtype
from stabmon.analysis.forward import run_model
from stabmon.analysis.record import AnalysisRecord
from stabmon.operator import AttentionOperator
from stabmon.operator.from_call import operator_of

MAX_SIZE = 512
"""Largest number of pixels of a map in each direction."""


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Maps of one sample.

    Attributes:
        maps: layer -> ``[H, P, R]`` float32 in [0, 1]: queries down, keys across.
        factors: layer -> (queries, keys) of one pixel; a pixel holds their largest weight. (1, 1)
            is exact.
        sizes: layer -> (Q, K) before pooling.
        sample: index of the sample in the batch.

    Example:
        >>> maps = {"h.0": np.ones((2, 3, 3), np.float32)}
        >>> AttentionMaps(maps, {"h.0": (2, 2)}, {"h.0": (6, 6)}).to_record().values["pooling"]
        {'h.0': [2, 2]}
    """

    maps: dict[str, np.ndarray]
    factors: dict[str, tuple[int, int]]
    sizes: dict[str, tuple[int, int]]
    sample: int = 0

    def to_record(self) -> AnalysisRecord:
        """Return a record of kind ``heatmap``.

        Values: ``sample``, ``layers`` (names), ``pooling`` (layer -> [queries, keys] a pixel),
        ``sizes`` (layer -> [Q, K]). Arrays: ``maps/<layer>`` ``[H, P, R]`` float32.
        """
        values: dict[str, Any] = {
            "sample": self.sample,
            "layers": list(self.maps),
            "pooling": {layer: list(factor) for layer, factor in self.factors.items()},
            "sizes": {layer: list(size) for layer, size in self.sizes.items()},
        }
        return AnalysisRecord("heatmap", values, {f"maps/{n}": m for n, m in self.maps.items()})


def attention_maps(
    model: nn.Module,
    batch: Any,
    *,
    layers: str | None = None,
    sample: int = 0,
    max_size: int = MAX_SIZE,
    heads: Sequence[int] | None = None,
    attention_modules: tuple[str, ...] = (),
) -> AttentionMaps:
    """Take one sample's attention maps, with at most ``max_size`` pixels per side.

    Beyond that each pixel is the largest weight in a block of queries and keys, formed a few rows
    at a time: no map is ever held in full.

    Args:
        model: any model.
        batch: the input of its forward.
        layers: regular expression that a layer's name must contain; None for all.
        sample: index of the sample in the batch.
        max_size: pixels per side, at least 1.
        heads: query heads to keep; None for all.
        attention_modules: patterns of modules whose hand-written softmax is attention.

    Returns:
        The maps.

    Raises:
        ValueError: for a missing sample or head, a size below 1, or no matching layer.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> found = attention_maps(layer, torch.randn(1, 6, 8), max_size=3)
        >>> found.maps["self_attn"].shape, found.factors["self_attn"]
        ((2, 3, 3), (2, 2))
    """
    if max_size < 1:
        raise ValueError(f"max_size {max_size}: give at least 1 pixel, 512 is usual")
    found = AttentionMaps({}, {}, {}, sample)

    def take(call: Any) -> None:
        attention = operator_of(call)
        if not -attention.batch <= sample < attention.batch:
            raise ValueError(f"sample {sample}: {call.layer} has {attention.batch} samples")
        if wrong := [h for h in heads or () if not -attention.heads <= h < attention.heads]:
            raise ValueError(f"head {wrong[0]}: {call.layer} has {attention.heads} heads")
        size = attention.queries, attention.keys
        found.sizes[call.layer] = size
        found.factors[call.layer] = (-(-size[0] // max_size), -(-size[1] // max_size))
        chosen = pooled_map(attention, sample % attention.batch, *found.factors[call.layer])
        if heads is not None:
            chosen = chosen[list(heads)]
        found.maps[call.layer] = chosen.float().cpu().numpy()

    run_model(model, batch, take, pattern=layers, attention_modules=attention_modules)
    return found


def pooled_map(
    attention: AttentionOperator, sample: int, query_factor: int, key_factor: int
) -> Tensor:
    """Compute one sample's map with the largest weight of each block, ``[H, P, R]``.

    Args:
        attention: the operator.
        sample: index of the sample.
        query_factor, key_factor: queries and keys per pixel.
    """
    a = attention
    rows_out, cols_out = -(-a.queries // query_factor), -(-a.keys // key_factor)
    kind = compute_dtype(a.query)
    out = torch.zeros(a.heads, rows_out, cols_out, dtype=kind, device=a.query.device)
    step = max(1, (1 << 20) // max(1, a.heads * a.keys * query_factor)) * query_factor
    for start in range(0, a.queries, step):
        rows = slice(start, min(start + step, a.queries))
        cols, p = a.probabilities_of(rows, slice(sample, sample + 1))
        block = torch.zeros(
            a.heads,
            -(-(rows.stop - start) // query_factor) * query_factor,
            cols_out * key_factor,
            dtype=kind,
            device=p.device,
        )
        block[:, : rows.stop - start, cols] = p[0]
        pooled = functional.max_pool2d(block, (query_factor, key_factor))
        first = start // query_factor
        out[:, first : first + pooled.shape[1]] = pooled
    return out
