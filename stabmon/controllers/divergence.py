"""Divergence of modified attention from the original, per head.

Rows are summed block by block. B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.controllers.linear_reading import logits_of
from stabmon.records import AttentionCall


@torch.no_grad()
def row_means(original: AttentionCall, modified: AttentionCall) -> dict[str, Tensor]:
    """Compare one call before and after its controller.

    Means over batch and rows that see a key:

    - ``controller_kl``: KL(original || modified) of each row, nats, at least 0;
    - ``attention_variance``: variance of a modified row's weights over its visible keys, at least
      0: 0 where it is uniform.

    Args:
        original: the call before.
        modified: the call after.

    Returns:
        ``[H]`` by name.
    """
    divergence, variance, count = (torch.zeros(()) for _ in range(3))
    for (_, before, _), (_, after, _) in zip(logits_of(original), logits_of(modified), strict=True):
        visible = before.isneginf().logical_not()
        seen = visible.sum(-1)
        p, q = log_weights_of(before, original.sinks), log_weights_of(after, modified.sinks)
        terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
        divergence = divergence + torch.where(seen > 0, terms.sum(-1), 0.0).sum(
            dim=(0, 2), dtype=torch.float64
        )
        weights = q.exp()[..., : before.shape[-1]]
        row_variance = (
            weights - weights.sum(-1, keepdim=True) / seen[..., None]
        ).square().masked_fill(~visible, 0.0).sum(-1) / seen
        variance = variance + torch.where(seen > 0, row_variance, 0.0).sum(
            dim=(0, 2), dtype=torch.float64
        )
        count = count + (seen > 0).sum(dim=(0, 2))
    return {
        "controller_kl": (divergence / count).clamp(min=0),
        "attention_variance": variance / count,
    }


def log_weights_of(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return logarithms of softmax weights, ``[B, H, rows, K]``.

    One column more where a learned sink joins each row.
    """
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat((logits, column), dim=-1)
    return torch.log_softmax(logits, dim=-1)
