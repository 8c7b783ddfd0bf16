"""Formulas of attention in float64, without stabmon or transformers.

B batch, H query heads, G key heads, Q queries, K keys, S sequence, D head dimension, C model
dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention call, recomputed."""

    scores: Tensor
    """Scores ``[B, H, Q, K]`` float64 with scale and bias, before softcap and mask."""
    visible: Tensor
    """Visible keys of each query, ``[B, 1, Q, K]`` bool."""
    softcap: float | None = None


def probabilities(attention: Attention) -> Tensor:
    """Return ``[B, H, Q, K]``, the softmax over the visible keys.

    NaN in rows that see none.
    """
    scores, cap = attention.scores, attention.softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~attention.visible, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def statistics(attention: Attention) -> dict[str, Tensor]:
    """Return per-head values ``[H]`` over all rows that see a key.

    Mean entropy (nats), mean max probability, max raw score.
    """
    p = probabilities(attention)
    rows = attention.visible.any(-1).expand(p.shape[:-1])
    entropy = -torch.special.xlogy(p, p).sum(-1)
    seen = attention.scores.masked_fill(~attention.visible, -math.inf)
    return {
        "attention_entropy": mean_over(entropy, rows),
        "max_probability": mean_over(p.amax(-1), rows),
        "max_logit": seen.amax((0, 2, 3)),
    }


def mean_over(values: Tensor, rows: Tensor) -> Tensor:
    """Return the mean ``[H]`` of ``values`` ``[B, H, Q]`` over the counted rows."""
    return values.masked_fill(~rows, 0.0).sum((0, 2)) / rows.sum((0, 2))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Project inputs ``[B, S, C]`` and cut them into heads, ``[B, H, S, D]``.

    By a linear layer's weight ``[H * D, C]``.
    """
    out = hidden.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    return out.view(*out.shape[:2], heads, -1).transpose(1, 2)


def dot(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return scaled products ``[B, H, Q, K]``.

    Query head h reads key head ``h // (H / G)``.
    """
    group = query.shape[1] // key.shape[1]
    reads = [head // group for head in range(query.shape[1])]
    return scale * torch.einsum("bhqd,bhkd->bhqk", query, key[:, reads])


def rope(x: Tensor, theta: float) -> Tensor:
    """Turn each pair (i, i + D/2) of ``[B, H, S, D]`` by position · theta^(−2i/D).

    Su et al. 2021, half-split layout.
    """
    length, width = x.shape[-2:]
    rate = theta ** (-2.0 * torch.arange(width // 2, dtype=torch.float64) / width)
    turn = torch.polar(
        torch.ones(()).double(), torch.arange(length, dtype=torch.float64)[:, None] * rate
    )
    turned = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([turned.real, turned.imag], -1)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Divide ``x`` by its root mean square along the last axis, times ``gain``."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * gain.double()


def visible(
    keys: Tensor, queries: int, *, causal: bool = False, window: int | None = None
) -> Tensor:
    """Return the visible keys of each query, ``[B, 1, Q, K]``.

    From ``keys`` ``[B, K]`` bool (False is padding). Causal: key j ≤ query i. Window w: i − j < w.
    """
    distance = torch.arange(queries)[:, None] - torch.arange(keys.shape[1])
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return (seen & keys[:, None, :]).unsqueeze(1)


def t5_bias(
    table: Tensor, queries: int, keys: int, *, bidirectional: bool, furthest: int
) -> Tensor:
    """Return T5's relative bias ``[1, H, Q, K]`` from its table ``[buckets, H]``.

    Raffel et al. 2020, section 2.1. One bucket per distance up to half of them, then evenly in the
    logarithm of the distance up to ``furthest``; looking both ways, later keys take the upper half
    of the table.
    """
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    near = buckets // 2

    def bucket(later: int) -> int:
        distance = abs(later) if bidirectional else max(-later, 0)
        offset = buckets if bidirectional and later > 0 else 0
        if distance < near:
            return offset + distance
        steps = buckets - near
        # (distance / near) >= (furthest / near) ** (step / steps), in whole numbers
        passed: list[bool] = [
            pow(distance, steps) * pow(near, step) >= pow(near, steps) * pow(furthest, step)
            for step in range(1, steps)
        ]
        return offset + near + sum(passed)

    index = torch.tensor([[bucket(key - query) for key in range(keys)] for query in range(queries)])
    return table.double()[index].permute(2, 0, 1)[None]
