"""Attention of queries to some of their keys, a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.analysis.compression.key_choices import GroupedKeys, KeyChoice
from stabmon.analysis.dtypes import compute_dtype
from stabmon.analysis.patterns.context_rows import visible_keys
from stabmon.operator import AttentionOperator
from stabmon.operator.row_weights import logits_of


def restricted_attention(
    attention: AttentionOperator, value: Tensor, choice: KeyChoice, *, elements: int = 1 << 20
) -> Tensor:
    """Compute the output of attention restricted to the kept keys of each query.

    The softmax runs over the kept keys alone (and a learned sink); soft cap, bias, mask and window
    count as in the model.

    Args:
        attention: the operator of a call.
        value: ``[B, H_kv, K, E]``.
        choice: the choice of keys.
        elements: weights in one block.

    Returns:
        ``[B, H, Q, E]`` float32 (float64 for float64 inputs).
    """
    a = attention
    value = value.to(compute_dtype(a.query))
    value = value.expand(a.batch, -1, -1, -1)
    value = value.repeat_interleave(a.heads // value.shape[1], dim=1)
    out = value.new_zeros(a.batch, a.heads, a.queries, value.shape[-1])
    choice.begin(a)
    merged = _Merged(a, value, choice) if isinstance(choice, GroupedKeys) else None
    step = max(1, elements // max(1, a.batch * a.heads * a.keys))
    start = 0
    while start < a.queries:
        stop = min(start + step, a.queries, choice.ends(start) or a.queries)
        rows, start = slice(start, stop), stop
        cols = slice(0, a.visibility.key_range(rows.start, rows.stop)[1])
        if cols.stop == 0:
            continue
        logits = logits_of(a, rows, cols, slice(0, a.batch), slice(0, a.heads))
        visible = visible_keys(a, rows, cols)
        kept = choice.kept(rows, visible, logits)
        logits = logits.masked_fill(~kept, -torch.inf)
        values = value[:, :, cols]
        if merged is not None:
            logits, values = merged.join(rows, visible, logits, values)
        if a.sinks is not None:
            sinks = a.sinks_of_rows()[:, :, rows].to(logits.dtype)
            logits = torch.cat([logits, sinks[..., None]], -1)
            values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top.isneginf(), 0.0)).exp_()
        total = weights.sum(-1, keepdim=True).masked_fill_(top.isneginf(), 1.0)
        out[:, :, rows] = (weights / total) @ values
    return out


class _Merged:
    """Mean keys and values of groups, and their visibility to rows."""

    def __init__(self, attention: AttentionOperator, value: Tensor, choice: GroupedKeys) -> None:
        a = attention
        seen = a.visibility.seen_keys
        if seen is None:
            seen = torch.ones(1, 1, 1, dtype=torch.bool, device=value.device)
        seen = seen.expand(a.batch, a.heads, a.keys)
        key = a.key.to(value.dtype).repeat_interleave(a.heads // a.key_heads, dim=1)
        self._attention, self._choice = a, choice
        self._key = choice.merged(key, seen)
        self._value = choice.merged(value, seen)
        self._bonus = choice.counts(seen).to(value.dtype).log()

    def join(
        self, rows: slice, visible: Tensor, logits: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append the groups visible to the rows to their keys."""
        a = self._attention
        groups = self._choice.grouped(visible)
        count = groups.shape[-1]
        query = a.query[:, :, rows].to(logits.dtype)
        scores = a.scale * (query @ self._key[:, :, :count].mT)
        if a.softcap is not None:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        _, bias = a.visibility.block(rows, slice(0, visible.shape[-1]))
        if bias is not None:
            flat = bias.to(logits.dtype).masked_fill(~visible, 0.0)
            flat = flat.expand(a.batch, a.heads, *visible.shape[-2:])
            hits = visible.expand_as(flat)
            parts = [
                torch.nn.functional.pad(x, (0, -x.shape[-1] % self._choice.size))
                .unflatten(-1, (-1, self._choice.size))
                .sum(-1)
                for x in (flat, hits.to(flat.dtype))
            ]
            scores = scores + parts[0] / parts[1].clamp(min=1)
        scores = scores + self._bonus[:, :, None, :count]
        scores = scores.masked_fill(~groups, -torch.inf)
        return torch.cat([logits, scores], -1), torch.cat([values, self._value[:, :, :count]], 2)
