"""Cosines between the attention maps of layers, without storing a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stabmon.analysis.dtypes import compute_dtype, sum_dtype
from stabmon.operator import AttentionOperator


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """Cosines between the layers' head-mean maps.

    Attributes:
        layers: names of the L layers.
        cosine: ``[B, L, L]`` float64 in [0, 1]; NaN between maps of different shapes, and for empty
            maps.

    Example:
        >>> LayerSimilarity(("h.0",), np.ones((1, 1, 1))).cosine.shape
        (1, 1, 1)
    """

    layers: tuple[str, ...]
    cosine: np.ndarray


def layer_similarity(
    layers: Mapping[str, AttentionOperator],
    valid: Mapping[str, Tensor] | None = None,
    *,
    elements: int = 1 << 20,
) -> LayerSimilarity:
    """Compute the cosines of the layers' head-mean maps, exactly.

    The cosine of maps A over the valid queries is <A_l, A_m>_F / (|A_l| |A_m|). A few rows of all
    layers are formed at once, so memory is linear in the length; queries and keys of all layers are
    kept by the caller.

    Args:
        layers: the operator of each layer.
        valid: layer -> ``[B, Q]`` bool, queries that are no padding; None for all that count.
        elements: weights of one layer in one block.

    Returns:
        The cosines.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.randn(1, 2, 6, 4)
        >>> attention = attention_operator(query, query, scale=0.5, is_causal=True)
        >>> layer_similarity({"h.0": attention, "h.1": attention}).cosine.round(3).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    names = tuple(layers)
    batch = max(a.batch for a in layers.values())
    cosine = np.full((batch, len(names), len(names)), np.nan)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for place, a in enumerate(layers.values()):
        groups.setdefault((a.batch, a.queries, a.keys), []).append(place)
    for (size, _, _), places in groups.items():
        if size != batch:
            continue
        members = [layers[names[place]] for place in places]
        counted = [
            a.is_counted.any(1) if valid is None else valid[names[place]]
            for place, a in zip(places, members, strict=True)
        ]
        cosine[:, np.array(places)[:, None], places] = _cosines(members, counted, elements)
    return LayerSimilarity(names, cosine)


def _cosines(members: list[AttentionOperator], valid: list[Tensor], elements: int) -> np.ndarray:
    one = members[0]
    exact = sum_dtype(one.query)
    gram = one.query.new_zeros(one.batch, len(members), len(members), dtype=exact)
    step = max(1, elements // max(1, one.batch * max(a.heads for a in members) * one.keys))
    step = max(1, min(step, elements // max(1, one.batch * len(members) * one.keys)))
    for start in range(0, one.queries, step):
        rows = slice(start, min(start + step, one.queries))
        shape = (one.batch, rows.stop - start, len(members), one.keys)
        maps = one.query.new_zeros(shape, dtype=compute_dtype(one.query))
        for place, (a, counts) in enumerate(zip(members, valid, strict=True)):
            cols, p = a.probabilities_of(rows)
            mean = p.mean(1).masked_fill(~counts[:, rows, None], 0.0)
            maps[:, :, place, cols] = mean.to(maps.device)
        gram += (maps @ maps.mT).sum(1).to(exact)
    norm = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosine: np.ndarray = (gram / (norm[:, :, None] * norm[:, None])).cpu().double().numpy()
    return cosine
