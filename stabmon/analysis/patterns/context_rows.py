"""Statistics of attention rows over their context, a block of rows at a time.

The *context* of a query is every key that it sees but its own: under causality the keys before
it, in bidirectional attention the keys on both sides, in cross attention all visible keys.
Probabilities stay as the model uses them; they are not renormalised over the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator


def visible_keys(attention: AttentionOperator, rows: slice, cols: slice) -> Tensor:
    """Return the visible keys of a block, ``[B or 1, H or 1, rows, cols]`` bool.

    Args:
        attention: the operator of the call.
        rows: query rows.
        cols: key columns.
    """
    hidden, _ = attention.visibility.block(rows, cols)
    if hidden is not None:
        hidden = hidden.view((1,) * (4 - hidden.dim()) + hidden.shape)
        return ~hidden.expand(-1, -1, rows.stop - rows.start, -1)
    size = (1, 1, rows.stop - rows.start, cols.stop - cols.start)
    return torch.ones(size, dtype=torch.bool, device=attention.query.device)


def own_positions(attention: AttentionOperator, rows: slice) -> Tensor:
    """Return the key index of each query's own token, ``[rows]`` int64.

    The last query is aligned with the last key.

    Args:
        attention: the operator of the call.
        rows: query rows.
    """
    start = attention.visibility.offset + rows.start
    return torch.arange(start, start + rows.stop - rows.start, device=attention.query.device)


def without_own(visible: Tensor, own: Tensor | None, cols: slice) -> Tensor:
    """Return the context: ``visible`` without each row's own key.

    Args:
        visible: ``[B or 1, H or 1, rows, cols]`` bool.
        own: ``[rows]`` key index of each query's own token; None for the whole of ``visible``.
        cols: key columns of the block.
    """
    if own is None:
        return visible
    keys = torch.arange(cols.start, cols.stop, device=visible.device)
    return visible & (keys != own[:, None])


def row_sums(p: Tensor, context: Tensor, own: Tensor | None, cols: slice) -> dict[str, Tensor]:
    """Compute the terms of means over many queries, in few passes over a block.

    ``context_size`` n, ``context_mass`` sum p, ``entropy`` -sum p ln p in nats,
    ``normalized_entropy`` entropy / ln n (NaN below two keys), ``recent`` and ``distant`` the mean
    probability of the newest and of the oldest max(1, n // 4) keys (NaN below two keys),
    ``neighbours`` sum p_j p_{j+1} and ``squares`` sum p_j^2, all over the context; and ``spread``,
    the entropy over all visible keys. Sums over all keys less the own key's part: absolute errors
    of 1e-6 in float32.

    Args:
        p: ``[B, H, rows, cols]`` probabilities; 0 where hidden.
        context: ``[B or 1, H or 1, rows, cols]`` bool.
        own: ``[rows]`` key index of each query's own token, or None.
        cols: key columns of the block.

    Returns:
        Each ``[B, H, rows]``.
    """
    rank, n, quarter = _ranks(context)
    size = n[..., 0].to(p.dtype).expand(p.shape[:3])
    share = quarter[..., 0].to(p.dtype)
    before, at_own, after = (_own_weight(p, own, cols, shift) for shift in (-1, 0, 1))
    # half the time of torch.special.entr on a CPU (torch 2.13); 0 ln 0 is 0, NaN stays NaN
    spread = -p.clamp(min=torch.finfo(p.dtype).tiny).log_().mul_(p).sum(-1)
    entropy = (spread - torch.special.entr(at_own)).clamp(min=0).masked_fill(size == 0, torch.nan)
    newest, oldest = context & (rank > n - quarter), context & (rank <= quarter)
    recent, distant = masked_sums(p, [newest, oldest])
    few = size < 2
    return {
        "context_size": size,
        "context_mass": p.sum(-1) - at_own,
        "entropy": entropy,
        "normalized_entropy": (entropy / size.log()).masked_fill(few, torch.nan),
        "recent": (recent / share).masked_fill(few, torch.nan),
        "distant": (distant / share).masked_fill(few, torch.nan),
        "neighbours": (p[..., 1:] * p[..., :-1]).sum(-1) - at_own * (before + after),
        "squares": torch.linalg.vector_norm(p, dim=-1).square() - at_own.square(),
        "spread": spread,
    }


def query_statistics(p: Tensor, context: Tensor) -> dict[str, Tensor]:
    """Compute the statistics of single queries, as in :class:`AttentionPatterns`.

    Args:
        p: ``[B, H, rows, cols]``.
        context: ``[B or 1, H or 1, rows, cols]`` bool.

    Returns:
        Each ``[B, H, rows]``; without a context NaN, ``argmax`` (an index into the block's
        columns) -1. The first key's mass and the mean distance are not among them.
    """
    rank, n, quarter = _ranks(context)
    kept = p.masked_fill(~context, 0.0)
    size = n[..., 0].to(p.dtype).expand(p.shape[:3])
    none, few = size == 0, size < 2
    mass = kept.sum(-1)
    mean = mass / size
    variance = (kept - mean[..., None]).masked_fill(~context, 0.0).square().sum(-1) / size
    entropy = torch.special.entr(kept).sum(-1).abs()  # abs: one key with everything gives -0.0
    entropy = entropy.masked_fill(none, torch.nan)
    recent = kept.masked_fill(rank <= n - quarter, 0.0).sum(-1)
    distant = kept.masked_fill(rank > quarter, 0.0).sum(-1)
    largest, where = kept.masked_fill(~context, -1.0).max(-1)
    return {
        "context_size": size,
        "context_mass": mass,
        "entropy": entropy,
        "normalized_entropy": (entropy / size.log()).masked_fill(few, torch.nan),
        "mean": mean,
        "variance": variance,
        "std": variance.sqrt(),
        "focus": 1 / entropy,
        "max_entropy": size.log().masked_fill(none, torch.nan),
        "max": largest.masked_fill(none, torch.nan),
        "argmax": where.masked_fill(none, -1),
        "recent_distant_ratio": (recent / distant).masked_fill(few, torch.nan),
    }


def masked_sums(p: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
    """Sum rows over several sets of keys, ``[B, H, rows]`` each.

    Masks shared by all heads are products of small matrices: ten times as fast as multiplying and
    adding.

    Args:
        p: ``[B, H, rows, cols]``.
        masks: each ``[B or 1, H or 1, rows, cols]`` bool.
    """
    if not masks:
        return []
    if any(mask.shape[1] > 1 for mask in masks):
        return [(p * mask).sum(-1) for mask in masks]
    sums = []
    for sample, weights in enumerate(p):
        chosen = [mask[sample if len(mask) > 1 else 0, 0] for mask in masks]
        table = torch.stack(chosen, 1).to(p.dtype)  # [rows, M, cols]
        sums.append((weights.transpose(0, 1) @ table.mT).permute(2, 1, 0))  # [M, H, rows]
    return list(torch.stack(sums, 1).unbind(0))


def _ranks(context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each context key's rank from 1, their number, and a quarter of it."""
    rank = context.cumsum(-1, dtype=torch.int32)
    n = rank[..., -1:] if rank.shape[-1] else rank.new_zeros((*rank.shape[:-1], 1))
    return rank, n, (n // 4).clamp(min=1)


def _own_weight(p: Tensor, own: Tensor | None, cols: slice, shift: int) -> Tensor:
    """Return the weight of the key ``shift`` after each query's own; else 0."""
    if own is None:
        return torch.zeros_like(p[..., 0])
    place = own[:, None] + shift - cols.start
    inside = (place >= 0) & (place < p.shape[-1])
    at = p.gather(-1, place.clamp(0, p.shape[-1] - 1).expand(*p.shape[:3], 1))
    return torch.where(inside, at, 0.0)[..., 0]


def mean_distance(p: Tensor, own: Tensor | None, cols: slice, *, is_causal: bool) -> Tensor:
    """Compute sum_j p_ij |i - j| in tokens, ``[B, H, rows]``; NaN in cross attention.

    Args:
        p: ``[B, H, rows, cols]``.
        own: ``[rows]`` key index of each query's own token, or None.
        cols: which keys the block holds.
        is_causal: True if no query sees a later key; one matrix-vector product is then enough.
    """
    if own is None:
        return torch.full_like(p[..., 0], torch.nan)
    keys = torch.arange(cols.start, cols.stop, device=p.device)
    if not is_causal:
        return (p * (own[:, None] - keys).abs().to(p.dtype)).sum(-1)
    centre = own[0]  # near the keys whose distances are small, so that little is lost
    back = p @ (centre - keys).to(p.dtype)
    return back + (own - centre).to(p.dtype) * p.sum(-1)


def first_keys(attention: AttentionOperator) -> Tensor:
    """Return each head's first key visible to any query, ``[B, H]`` int64."""
    first = attention.visibility.first_visible
    if first is None:
        device = attention.query.device
        return torch.zeros(attention.batch, attention.heads, dtype=torch.int64, device=device)
    return first.expand(attention.batch, attention.heads)


def mass_at(p: Tensor, keys: Tensor, cols: slice) -> Tensor:
    """Return the probability of one key per head, ``[B, H, rows]``; else 0.

    Args:
        p: ``[B, H, rows, cols]``.
        keys: ``[B, H]`` int64, indices among all keys.
        cols: which keys the block holds.
    """
    if p.shape[-1] == 0:
        return torch.zeros(p.shape[:3], dtype=p.dtype, device=p.device)
    index = (keys - cols.start)[:, :, None, None].expand(-1, -1, p.shape[2], 1)
    inside = (index >= 0) & (index < p.shape[-1])
    value = p.gather(-1, index.clamp(0, p.shape[-1] - 1))
    return torch.where(inside, value, 0.0)[..., 0]
