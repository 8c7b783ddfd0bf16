"""Attention as a matrix-free linear operator, which never writes out Q x K.

It gives every statistic of every row, and products. Three engines give the same numbers:
``dense`` (float64 oracle), ``blockwise`` (any mask, bias, softcap, sink; memory linear in the
length) and ``fused`` (the fused kernel's own output and logsumexp).
"""

from __future__ import annotations

from torch import Tensor

from stabmon.operator.base import AttentionOperator
from stabmon.operator.blockwise import BlockwiseAttention
from stabmon.operator.dense import DenseAttention
from stabmon.operator.fused import FusedAttention
from stabmon.operator.inputs import check_inputs
from stabmon.operator.row_weights import RowBlock
from stabmon.operator.statistics import STATISTICS
from stabmon.operator.visibility.visibility import visibility_of

__all__ = [
    "ENGINES",
    "STATISTICS",
    "AttentionOperator",
    "RowBlock",
    "attention_operator",
    "operator_of_scores",
]

ENGINES: dict[str, type[AttentionOperator]] = {
    "dense": DenseAttention,
    "blockwise": BlockwiseAttention,
    "fused": FusedAttention,
}


def attention_operator(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    is_self: bool = False,
    engine: str = "auto",
) -> AttentionOperator:
    """Return the attention of one call as an operator for statistics and products.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, H_kv, K, D]``; query head h reads key head h // (H / H_kv).
        scale: scores are ``scale * query @ key.T``.
        is_causal: query i sees keys up to i + K - Q (the last query is aligned with the last key,
            as in decoding).
        mask: broadcasts to ``[B, H, Q, K]``; bool (True is visible) or additive float, in which
            -inf or half the dtype's minimum and below hides and anything else is a bias.
        window: with ``is_causal``, the newest keys a query sees, itself included; without, keys at
            a distance below ``window``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before bias and mask.
        sinks: ``[H]`` learned logits that join each row's softmax but no value, or ``[B, H, Q]``
            where each row has its own.
        is_self: query i is of the same token as key i + K - Q (known by itself with ``is_causal``):
            a query whose key the mask hides from every row is padding, and counts in no signal.
        engine: ``dense``, ``blockwise``, ``fused`` or ``auto``, the fastest that is exact here.

    Returns:
        The operator; it keeps query and key, detached, and computes nothing yet.

    Raises:
        ValueError: naming the value and the fix, for shapes, dtypes or names that do not fit.

    Example:
        >>> import torch
        >>> query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
        >>> attention = attention_operator(query, key, scale=8**-0.5, is_causal=True)
        >>> attention.entropy()[0, 0].exp()
        tensor([1., 2., 3.])
    """
    check_inputs(query, key, scale, mask, window, softcap, sinks)
    visibility = visibility_of(
        query, key, is_causal=is_causal, window=window, mask=mask, is_self=is_self
    )
    sinks = None if sinks is None else sinks.detach()
    return _engine(engine, query)(query.detach(), key.detach(), scale, visibility, softcap, sinks)


def operator_of_scores(
    scores: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    is_self: bool = False,
    engine: str = "auto",
) -> AttentionOperator:
    """Return the operator of scores that a model has formed itself.

    Args:
        scores: ``[B, H, Q, K]``, hidden keys at -inf.
        softcap: see :func:`attention_operator`.
        sinks: see :func:`attention_operator`.
        is_self: see :func:`attention_operator`.
        engine: see :func:`attention_operator`.

    Returns:
        The operator; signals that need query and key are NaN.

    Raises:
        ValueError: for other shapes, an empty tensor, or an unknown engine.

    Example:
        >>> import torch
        >>> operator_of_scores(torch.zeros(1, 1, 1, 4)).log_partition().exp()
        tensor([[[4.]]])
    """
    if scores.dim() != 4 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and {scores.dtype}: give a floating-point [B, "
            "H, Q, K]"
        )
    batch, heads, queries, keys = scores.shape
    query, key = scores.new_zeros(batch, heads, queries, 1), scores.new_zeros(batch, heads, keys, 1)
    mask = scores.detach().isneginf().logical_not()
    visibility = visibility_of(query, key, is_causal=False, window=None, mask=mask, is_self=is_self)
    return _engine(engine, query)(query, key, 1.0, visibility, softcap, sinks, scores.detach())


def _engine(name: str, query: Tensor) -> type[AttentionOperator]:
    if name == "auto":
        return FusedAttention if query.device.type == "cuda" else BlockwiseAttention
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}. Known: auto, {', '.join(ENGINES)}")
    return ENGINES[name]
