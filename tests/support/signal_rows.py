"""Attention rows of known scores, and the same rows written out in float64 for oracles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stabmon.operator import AttentionOperator, attention_operator


def operator_of_rows(*rows: list[float], dtype: torch.dtype = torch.float32) -> AttentionOperator:
    """One head whose query i has the scores ``rows[i]``; None of the keys is hidden."""
    queries = len(rows)
    return attention_operator(
        torch.eye(queries, dtype=dtype)[None, None],
        torch.tensor(rows, dtype=dtype).T[None, None],
        scale=1.0,
    )


def random_call(
    seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[AttentionOperator, np.ndarray, Tensor, Tensor]:
    """A causal, left-padded call with grouped heads, its float64 logits ``[B, H, Q, K]`` (hidden
    ones -inf), query and key.
    """
    generator = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(2, 4, 24, 8, generator=generator, dtype=dtype)
    key = torch.randn(2, 2, 24, 8, generator=generator, dtype=dtype)
    mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    mask[1, ..., :5] = False
    operator = attention_operator(query, key, scale=0.35, is_causal=True, mask=mask)
    logits = 0.35 * query.double() @ key.double().repeat_interleave(2, dim=1).mT
    visible = torch.ones(24, 24, dtype=torch.bool).tril() & mask
    return operator, logits.masked_fill(~visible, -torch.inf).numpy(), query, key


def softmax(logits: np.ndarray) -> np.ndarray:
    """Rows of probabilities; rows that see nothing are 0."""
    top = logits.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
