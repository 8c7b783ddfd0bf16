"""The effect of a number format on a call's own queries and keys.

B batch, H query heads, R sampled rows, K keys, D head dimension. Two paths lead from query and key
to probabilities. A *fused* kernel multiplies rounded queries and keys and sums in float32; an
*eager* one also rounds the product to the format, where it can be inf, and then the scaled score.
Both take the softmax in float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stabmon.operator.dense import DenseAttention
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall

PATHS = ("eager", "fused")
_ENTRIES = 1 << 22
"""Scores written out at once."""


def rows_of(call: AttentionCall, rows: int) -> DenseAttention:
    """Return the call's operator on evenly spread query rows, the last included.

    As many batch elements are kept as memory allows.

    Args:
        call: the attention call.
        rows: number of query rows.
    """
    operator = operator_of(_first(call, rows), "dense")
    index = (
        torch.linspace(0, operator.queries - 1, min(rows, operator.queries)).round().long().unique()
    )
    chosen = operator.rows(index)
    assert isinstance(chosen, DenseAttention)
    return chosen


def moved(exact: DenseAttention, dtype: torch.dtype, path: str) -> Tensor:
    """Return the probability ``[B, H, R]`` moved by rounding to ``dtype``.

    Args:
        exact: the operator of the rows, in float64.
        dtype: the format.
        path: ``eager`` or ``fused``.

    Returns:
        Total variation of each row, in [0, 1]; NaN where a score is inf.
    """
    hidden, bias = exact._hidden_and_bias
    if exact.given_scores is not None:
        logits = exact.given_scores.to(dtype).double()
    else:
        query, key = (
            exact.query.to(dtype),
            exact.key.to(dtype).repeat_interleave(exact.heads // exact.key_heads, dim=1),
        )
        logits = query.double() @ key.double().mT
        logits = (
            (logits.to(dtype).double() * exact.scale).to(dtype).double()
            if path == "eager"
            else logits * exact.scale
        )
        if exact.softcap is not None:
            logits = exact.softcap * torch.tanh(logits / exact.softcap)
        if bias is not None:
            logits = logits + bias.to(dtype).double()
        if path == "eager":
            logits = logits.to(dtype).double()
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    rounded = torch.softmax(exact._with_sink(logits), dim=-1)[..., : exact.keys]
    difference = (rounded - exact.probabilities).abs().sum(-1) / 2
    return difference.masked_fill(~exact.occupied, 0.0)


def _first(call: AttentionCall, rows: int) -> AttentionCall:
    """Return the same call of its first batch elements, on the CPU.

    Only the CPU is sure to have float64.
    """
    whole = call.scores if call.scores is not None else call.query
    assert whole is not None
    keys = whole.shape[-1] if call.scores is not None or call.key is None else call.key.shape[2]
    per_element = whole.shape[1] * min(rows, whole.shape[2]) * keys
    keep = max(1, min(len(whole), _ENTRIES // per_element))

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:keep].cpu()

    mask = (
        call.mask
        if call.mask is None or call.mask.dim() < 4 or len(call.mask) == 1
        else call.mask[:keep]
    )
    return replace(
        call,
        query=cut(call.query),
        key=cut(call.key),
        scores=cut(call.scores),
        mask=None if mask is None else mask.cpu(),
        sinks=None if call.sinks is None else call.sinks.cpu(),
    )
