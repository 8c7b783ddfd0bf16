"""Attention with weights linear in the scores: p_j = (z_j - min z + 1) / sum.

Minimum and sum are over the keys that a row sees.

B batch, H query heads, H_kv key heads, Q queries, K keys, D head dimension, E features of a value,
C keys of a chunk.

Without a mask the output is exact in linear time but for the row minimum: with ``m = min z`` and
``z = scale * q.k``, the sums over visible keys of ``(z + 1 - m) v`` and of ``z + 1 - m`` are
``scale * q @ sum(k v^T) + (1 - m) * sum(v)``, prefix sums when causal. The key with the smallest
score is found in blocks of rows without gradients; its score is then formed again, so that the
gradient flows through the minimum as through any other score. Under a mask, blocks of rows are
written out, one at a time and again in backward. Nothing of the size Q x K is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stabmon.operator.visibility.visibility import Visibility

CHUNK = 64
"""Keys per step of a prefix sum."""
BLOCK = 1 << 21
"""Largest number of scores in a block of rows, over batch and heads."""


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visibility: Visibility
) -> Tensor:
    """Return the output of linear attention, differentiable in all tensors.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, H_kv, K, D]``; query head h reads key head h // (H / H_kv).
        value: ``[B, H_kv, K, E]``.
        scale: scores are ``scale * query @ key.T``.
        visibility: visible keys of each query, and the bias on its scores.

    Returns:
        ``[B, H, Q, E]``; 0 for a row that sees nothing.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    whole = (
        visibility.queries == visibility.keys
        and visibility.mask is None
        and visibility.window is None
    )
    if not whole:
        return by_rows(query, key, value, scale, visibility)
    ones = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
    smallest = key.gather(
        2, argmin_keys(query, key, scale, visibility)[..., None].expand(-1, -1, -1, key.shape[-1])
    )
    lift = 1 - scale * (query * smallest).sum(-1, keepdim=True)
    sums = (
        causal_sums(query, key, ones, lift, scale)
        if visibility.is_causal
        else full_sums(query, key, ones, lift, scale)
    )
    return sums[..., :-1] / sums[..., -1:]


@torch.no_grad()
def argmin_keys(query: Tensor, key: Tensor, scale: float, visibility: Visibility) -> Tensor:
    """Return each row's visible key with the smallest score, ``[B, H, Q]`` int64."""
    found = []
    for rows in row_blocks(query, key):
        cols = slice(*visibility.key_range(rows.start, rows.stop))
        scores = scale * (query[:, :, rows] @ key[:, :, cols].mT)
        hidden, _ = visibility.block(rows, cols)
        if hidden is not None:
            scores.masked_fill_(hidden, torch.inf)
        found.append(scores.argmin(-1) + cols.start)
    return torch.cat(found, dim=-1)


def full_sums(query: Tensor, key: Tensor, value: Tensor, lift: Tensor, scale: float) -> Tensor:
    """Return ``sum_j (z_ij + lift_i) v_j`` over all keys, ``[B, H, Q, E]``."""
    return scale * (query @ (key.mT @ value)) + lift * value.sum(2, keepdim=True)


def causal_sums(query: Tensor, key: Tensor, value: Tensor, lift: Tensor, scale: float) -> Tensor:
    """Return ``sum_{j <= i} (z_ij + lift_i) v_j``, ``[B, H, Q, E]``.

    All earlier chunks by prefix sums, the row's own chunk written out.
    """
    length = query.shape[2]
    size = min(CHUNK, length)
    short = -length % size
    query, key, value, lift = (
        torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, size))
        for x in (query, key, value, lift)
    )
    products, sums = key.mT @ value, value.sum(-2, keepdim=True)
    earlier = scale * (query @ sums_before(products)) + lift * sums_before(sums)
    own = (scale * (query @ key.mT) + lift).tril() @ value
    return (earlier + own).flatten(2, 3)[:, :, :length]


def sums_before(chunks: Tensor) -> Tensor:
    """Return for each chunk the sum over all earlier ones, along dimension 2.

    Under ``torch.use_deterministic_algorithms`` by a product, because CUDA's ``cumsum`` of floats
    raises there.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return chunks.cumsum(2) - chunks
    count = chunks.shape[2]
    earlier = torch.ones(count, count, dtype=chunks.dtype, device=chunks.device).tril(-1)
    return (earlier @ chunks.flatten(3)).view_as(chunks)


def by_rows(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visibility: Visibility
) -> Tensor:
    """Return the output under any mask, window or bias, by blocks of rows.

    Each block is written out when it is needed, and then dropped.
    """
    blocks = list(row_blocks(query, key))
    again = torch.is_grad_enabled() and len(blocks) > 1

    def block_of(rows: slice) -> Callable[..., Tensor]:
        hidden, bias = visibility.block(rows, slice(0, visibility.keys))

        def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = scale * (query @ key.mT)
            weights = linear_weights(scores if bias is None else scores + bias, hidden)
            return weights @ value

        return block

    def run(rows: slice) -> Tensor:
        args: tuple[Any, ...] = query[:, :, rows], key, value
        if not again:
            return block_of(rows)(*args)
        out: Tensor = checkpoint(
            lambda *given: block_of(rows)(*given),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return out

    return torch.cat([run(rows) for rows in blocks], dim=2)


def linear_weights(scores: Tensor, hidden: Tensor | None) -> Tensor:
    """Return the weights of written-out scores ``[..., K]``.

    Exactly 0 where ``hidden``, and in a row that sees nothing.
    """
    if hidden is None:
        lifted = scores - scores.amin(-1, keepdim=True) + 1
        return lifted / lifted.sum(-1, keepdim=True)
    lowest = scores.masked_fill(hidden, torch.inf).amin(-1, keepdim=True)
    lifted = (scores - torch.where(lowest.isinf(), 0.0, lowest) + 1).masked_fill(hidden, 0.0)
    total = lifted.sum(-1, keepdim=True)
    return lifted / torch.where(total > 0, total, 1.0)


def row_blocks(query: Tensor, key: Tensor) -> list[slice]:
    """Return blocks of query rows with at most :data:`BLOCK` scores or 16 rows."""
    batch, heads, queries = query.shape[:3]
    size = max(16, BLOCK // (batch * heads * key.shape[2]))
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
