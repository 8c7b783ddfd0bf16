"""Products of vectors with a layer's mixing matrix, upwards or downwards."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.analysis.rollout.mixing import HeadFusion, Observer, SampleMaps

LONG_BLOCK = 1 << 22
"""Attention weights in a block of long rows, 16 MB in float32.

Fewer rows multiply too slowly.
"""


def step_up(
    state: Tensor,
    maps: SampleMaps,
    fusion: HeadFusion,
    residual: float,
    *,
    source: Tensor | None = None,
    triangular: bool = False,
    observer: Observer | None = None,
) -> bool:
    """Multiply ``state`` by a layer's mixing matrix from the left, in place.

    Args:
        state: ``[Q, C]``.
        maps: the layer's attention maps of this sample.
        fusion, residual: see :class:`stabmon.analysis.rollout.mixing.Mixture`.
        source: ``[K, C]``, the state of the keys if they are another sequence's; None for
            self-attention.
        triangular: True if the state is square and lower triangular.
        observer: receives the weights of each block.

    Returns:
        Whether the state is lower triangular now.
    """
    maps.widen(max(LONG_BLOCK, state.numel() // 4) if source is None else LONG_BLOCK)
    keys = state if source is None else source
    in_place = source is not None or maps.is_causal
    narrow = triangular and source is None and maps.is_causal
    room = state if in_place else torch.empty_like(state)
    for block in maps.mixtures(fusion, residual, observer=observer):
        columns = slice(0, block.rows.stop if narrow else state.shape[1])
        kept = state[block.rows, columns] * block.kept
        room[block.rows, columns] = kept.add_(product(block.attended, keys[block.cols, columns]))
    if not in_place:
        state.copy_(room)
    return narrow


def step_down(
    relevance: Tensor,
    maps: SampleMaps,
    fusion: HeadFusion,
    residual: float,
    *,
    source: Tensor | None = None,
) -> Tensor:
    """Multiply ``relevance`` by a layer's mixing matrix from the right.

    Args:
        relevance: ``[T, Q]``, shares of the tokens after the layer in each of T targets.
        maps, fusion, residual: see :func:`step_up`.
        source: ``[T, K]``, to which the shares of another sequence's keys are added; None for
            self-attention.

    Returns:
        ``[T, Q]``: shares of the queries' tokens before the layer in each target.
    """
    maps.widen(LONG_BLOCK)
    before = torch.zeros_like(relevance)
    attended_to = before if source is None else source

    def wanted(rows: slice) -> bool:
        return bool((relevance[:, rows] != 0).any())

    for block in maps.mixtures(fusion, residual, only=wanted):
        part = relevance[:, block.rows]
        attended_to[:, block.cols] += product(part, block.attended)
        before[:, block.rows] += part * block.kept.T
    return before


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product with 0 times NaN as 0.

    An invisible token then passes no NaN on.

    Args:
        left: ``[N, K]``, without NaN.
        right: ``[K, M]``.
    """
    out: Tensor = left @ right
    if not bool(out.sum().isnan()) or not bool(right.isnan().any()):
        return out
    clean: Tensor = left @ right.nan_to_num(nan=0.0)
    caught = (left != 0).to(left.dtype) @ right.isnan().to(left.dtype)
    return clean.masked_fill_(caught > 0, torch.nan)
