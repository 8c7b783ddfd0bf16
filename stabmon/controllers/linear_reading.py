"""Output and weights of the linear attention of a captured call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stabmon.controllers.linear_attention import linear_attention, linear_weights, row_blocks
from stabmon.operator.visibility.visibility import Visibility, visibility_of
from stabmon.records import AttentionCall


def visibility_of_call(call: AttentionCall) -> Visibility:
    """Return the visible keys of each query of a call."""
    assert call.query is not None
    assert call.key is not None
    return visibility_of(
        call.query, call.key, is_causal=call.is_causal, window=call.window, mask=call.mask
    )


def attend_linearly(call: AttentionCall, value: Tensor) -> Tensor:
    """Return the output of a call's linear attention.

    Args:
        call: a call with query and key.
        value: ``[B, H_kv, K, E]``.

    Returns:
        ``[B, H, Q, E]`` in float32, or float64 for such values: scores are sums, and lose digits
        by cancellation.

    Raises:
        ValueError: for a call with a softcap or learned sinks, which linear attention has not.
    """
    if call.softcap is not None or call.sinks is not None:
        raise ValueError(
            f"{call.layer} has a softcap or learned sinks, which linear attention does not: leave "
            "it out with layers=[...]"
        )
    assert call.query is not None
    assert call.key is not None
    dtype = torch.promote_types(value.dtype, torch.float32)
    keys = call.key.shape[2]
    with torch.autocast(value.device.type, enabled=False):
        query, key = call.query.to(dtype), call.key.to(dtype)
        value = value[:, :, :keys].to(dtype).expand(len(key), -1, -1, -1)
        return linear_attention(query, key, value, call.scale, visibility_of_call(call))


def logits_of(call: AttentionCall) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield blocks of rows: the rows, their logits, and the hidden ones of these.

    Logits are ``[B, H, rows, K]`` in float32; the hidden entries bool, or None for none.
    """
    if call.scores is not None:
        for rows in row_blocks(call.scores, call.scores.mT):
            scores = call.scores[:, :, rows].float()
            yield rows, scores, scores.isneginf()
        return
    assert call.query is not None
    assert call.key is not None
    visibility = visibility_of_call(call)
    key = call.key.float().repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1).mT
    for rows in row_blocks(call.query, call.key):
        logits = call.scale * (call.query[:, :, rows].float() @ key)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        hidden, bias = visibility.block(rows, slice(0, visibility.keys))
        logits = logits if bias is None else logits + bias
        yield rows, logits if hidden is None else logits.masked_fill(hidden, -torch.inf), hidden


def log_weights(call: AttentionCall, share: Tensor | float) -> Tensor:
    """Return logarithms of share * linear + (1 - share) * softmax, ``[B, H, Q, K]``.

    They are written out, so for sampled steps alone.
    """
    share = share[None, :, None, None] if isinstance(share, Tensor) else share
    blocks = []
    for _, logits, hidden in logits_of(call):
        linear = linear_weights(logits.masked_fill(logits.isneginf(), 0.0), hidden)
        softmax = torch.softmax(logits, dim=-1).nan_to_num(0.0)
        blocks.append((share * linear + (1 - share) * softmax).log())
    return torch.cat(blocks, dim=2)
