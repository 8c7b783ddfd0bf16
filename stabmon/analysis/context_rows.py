"""Statistics of attention rows over their context, a block of rows at a time.

The *context* of a query is every key that it sees but its own: under causality the keys before
it, in bidirectional attention the keys on both sides, in cross attention all visible keys.
Probabilities stay as the model uses them; they are not renormalised over the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator


def visible_keys(attention: AttentionOperator, rows: slice, cols: slice) -> Tensor:
    """Return which keys a block of rows sees, ``[B or 1, H or 1, rows, cols]`` bool.

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
    """Return the key index of each query's own token, ``[rows]`` int64, the last aligned."""
    start = attention.visibility.offset + rows.start
    return torch.arange(start, start + rows.stop - rows.start, device=attention.query.device)


def without_own(visible: Tensor, own: Tensor | None, cols: slice) -> Tensor:
    """Return the context: ``visible`` without each row's own key (all of it where None)."""
    if own is None:
        return visible
    keys = torch.arange(cols.start, cols.stop, device=visible.device)
    return visible & (keys != own[:, None])


def context_statistics(p: Tensor, context: Tensor, *, for_query: bool) -> dict[str, Tensor]:
    """Compute the statistics of rows over their context.

    ``context_size`` n, ``context_mass`` sum p, ``entropy`` -sum p ln p in nats,
    ``normalized_entropy`` entropy / ln n (NaN below two keys), ``recent`` and ``distant`` the mean
    probability of the newest and of the oldest max(1, n // 4) keys (NaN below two keys),
    ``neighbours`` sum p_j p_{j+1} and ``squares`` sum p_j^2 over the context. With ``for_query``
    also ``mean``, ``variance`` (over the n keys, divided by n), ``std``, ``focus`` = 1 / entropy
    (inf where one key holds everything), ``max_entropy`` = ln n, ``max`` and ``argmax`` (index
    into the block's columns, -1 without a context).

    Args:
        p: ``[B, H, rows, cols]`` probabilities; 0 where hidden.
        context: ``[B or 1, H or 1, rows, cols]`` bool.
        for_query: whether the statistics of a single query are wanted too.

    Returns:
        Each ``[B, H, rows]``; without a context the mean, variance, maximum and entropy are NaN.
    """
    rank = context.cumsum(-1, dtype=torch.int32)
    n = rank[..., -1:] if rank.shape[-1] else rank.new_zeros((*rank.shape[:-1], 1))
    quarter = (n // 4).clamp(min=1)
    kept = p.masked_fill(~context, 0.0)
    size = n[..., 0].to(p.dtype)
    full = size.expand(p.shape[:3])
    mass = kept.sum(-1)
    entropy = torch.special.entr(kept).sum(-1).abs()  # abs: one key with everything gives -0.0
    entropy = entropy.masked_fill(full == 0, torch.nan)
    share = quarter[..., 0].to(p.dtype)
    recent = kept.masked_fill(rank <= n - quarter, 0.0).sum(-1) / share
    distant = kept.masked_fill(rank > quarter, 0.0).sum(-1) / share
    few = full < 2
    found = {
        "context_size": full,
        "context_mass": mass,
        "entropy": entropy,
        "normalized_entropy": (entropy / full.log()).masked_fill(few, torch.nan),
        "recent": recent.masked_fill(few, torch.nan),
        "distant": distant.masked_fill(few, torch.nan),
        "neighbours": (kept[..., 1:] * kept[..., :-1]).sum(-1),
        "squares": kept.square().sum(-1),
    }
    if for_query:
        mean = mass / full
        spread = (kept - mean[..., None]).masked_fill(~context, 0.0)
        variance = spread.square().sum(-1) / full
        largest, where = kept.masked_fill(~context, -1.0).max(-1)
        found |= {
            "mean": mean,
            "variance": variance,
            "std": variance.sqrt(),
            "focus": 1 / entropy,
            "max_entropy": full.log().masked_fill(full == 0, torch.nan),
            "max": largest.masked_fill(full == 0, torch.nan),
            "argmax": where.masked_fill(full == 0, -1),
        }
    return found


def ratio_of(recent: Tensor, distant: Tensor) -> Tensor:
    """Divide means of the newest by means of the oldest quarter; inf where only these are 0."""
    return recent / distant


def mean_distance(p: Tensor, own: Tensor | None, cols: slice) -> Tensor:
    """Compute sum_j p_ij |i - j| in tokens, ``[B, H, rows]``; NaN in cross attention."""
    if own is None:
        return torch.full_like(p[..., 0], torch.nan)
    keys = torch.arange(cols.start, cols.stop, device=p.device)
    return (p * (own[:, None] - keys).abs().to(p.dtype)).sum(-1)


def first_keys(attention: AttentionOperator) -> Tensor:
    """Return each head's first key that the mask lets any query see, ``[B, H]`` int64."""
    first = attention.visibility.first_visible
    if first is None:
        device = attention.query.device
        return torch.zeros(attention.batch, attention.heads, dtype=torch.int64, device=device)
    return first.expand(attention.batch, attention.heads)


def mass_at(p: Tensor, keys: Tensor, cols: slice) -> Tensor:
    """Pick the probability of one key a head, ``[B, H, rows]``; 0 outside of the block.

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
