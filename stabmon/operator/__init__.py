"""Attention as a matrix-free linear operator: every statistic of every row without ever writing out
Q x K.

Three engines give the same numbers: ``dense`` (float64 oracle), ``blockwise`` (any mask, bias,
softcap, sink; memory linear in the length) and ``fused`` (the fused kernel's own output and
logsumexp).
"""

from __future__ import annotations

from torch import Tensor

from stabmon.operator.base import STATISTICS, AttentionOperator, RowBlock, check_inputs
from stabmon.operator.blockwise import BlockwiseAttention
from stabmon.operator.dense import DenseAttention
from stabmon.operator.fused import FusedAttention
from stabmon.operator.visibility import Visibility

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
    """The attention of one call as an operator that can be asked for statistics and products.

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

    Raises:
        ValueError: naming the value and the mend, for shapes, dtypes or names that do not fit.
    """
    check_inputs(query, key, scale, mask, window, softcap, sinks)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(-1, -1, -1, key.shape[2]) if mask.shape[-1] == 1 else mask
    queries, keys = query.shape[2], key.shape[2]
    visibility = Visibility(
        queries, keys, is_causal, window, mask, keys - queries, query.device, is_self=is_self
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
    """The operator of scores ``[B, H, Q, K]`` that a model has formed itself, hidden keys at -inf.

    Raises:
        ValueError: for other shapes, an empty tensor, or an unknown engine.
    """
    if scores.dim() != 4 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and {scores.dtype}: give a floating-point [B, "
            "H, Q, K]"
        )
    batch, heads, queries, keys = scores.shape
    query, key = scores.new_zeros(batch, heads, queries, 1), scores.new_zeros(batch, heads, keys, 1)
    mask = scores.detach().isneginf().logical_not()
    visibility = Visibility(
        queries, keys, False, None, mask, keys - queries, scores.device, is_self=is_self
    )
    return _engine(engine, query)(query, key, 1.0, visibility, softcap, sinks, scores.detach())


def _engine(name: str, query: Tensor) -> type[AttentionOperator]:
    if name == "auto":
        return FusedAttention if query.device.type == "cuda" else BlockwiseAttention
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}. Known: auto, {', '.join(ENGINES)}")
    return ENGINES[name]
