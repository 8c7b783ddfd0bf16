"""Attention weights of some query rows, written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon.operator.computing import computing_on
from stabmon.operator.inputs import AttentionInputs
from stabmon.operator.row_sums import LN_2


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Attention weights of some query rows; no row sees a key outside ``cols``."""

    rows: slice
    cols: slice
    probabilities: Tensor
    """``[B, H, rows, cols]`` in [0, 1].

    A row sums to 1, to less beside a learned sink, to 0 where it sees no key.
    """


def probabilities_of(
    inputs: AttentionInputs, rows: slice, samples: slice, heads: slice
) -> tuple[slice, Tensor]:
    """See :meth:`stabmon.operator.AttentionOperator.probabilities_of`."""
    rows, samples, heads = (
        slice(*s.indices(n)[:2])
        for s, n in ((rows, inputs.queries), (samples, inputs.batch), (heads, inputs.heads))
    )
    cols = (
        slice(*inputs.visibility.key_range(rows.start, rows.stop))
        if rows.start < rows.stop
        else slice(0, 0)
    )
    with computing_on(inputs.query.device):
        logits = logits_of(inputs, rows, cols, samples, heads)
        if inputs.sinks is not None:
            sinks = inputs.sinks_of_rows()[samples, heads, rows].to(logits.dtype)
            logits = torch.cat([logits, sinks[..., None]], dim=-1)
        if logits.shape[-1] == 0:
            return cols, logits
        top = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(top.masked_fill(top.isneginf(), 0.0))
        # on a CPU exp takes 10 to 20 times as long where it underflows, exp2 does not
        weights = shifted.mul_(1 / LN_2).exp2_()
        weights /= weights.sum(-1, keepdim=True).masked_fill_(top.isneginf(), 1.0)
        return cols, weights if inputs.sinks is None else weights[..., :-1]


def logits_of(
    inputs: AttentionInputs, rows: slice, cols: slice, samples: slice, heads: slice
) -> Tensor:
    """Return the logits of some rows and keys.

    Args:
        inputs: the call.
        rows: query rows, with start and stop.
        cols: keys, with start and stop.
        samples: batch elements, with start and stop.
        heads: query heads, with start and stop.

    Returns:
        ``[b, h, rows, cols]``, hidden keys at -inf; a tensor of its own.
    """
    if inputs.given_scores is not None:
        logits = inputs.given_scores[samples, heads, rows, cols].to(inputs.compute_dtype, copy=True)
    else:
        groups = inputs.heads // inputs.key_heads
        first, last = heads.start // groups, -(-heads.stop // groups)
        query, key = (
            inputs.query[samples, heads, rows].to(inputs.compute_dtype),
            inputs.key[samples, first:last, cols].to(inputs.compute_dtype),
        )
        if groups > 1 and (heads.start % groups or heads.stop % groups):
            of_head = torch.arange(heads.start, heads.stop, device=key.device) // groups - first
            logits = query @ key[:, of_head].mT
        else:
            folded = query.unflatten(1, (last - first, -1)).flatten(2, 3)
            logits = (folded @ key.mT).unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
        logits *= inputs.scale
    if inputs.softcap is not None:
        logits.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    see = inputs.visibility.of(samples, heads)
    for side in inputs.visibility.sides(rows, cols):
        hidden, bias = see.block(rows, side)
        part = logits[..., side.start - cols.start : side.stop - cols.start]
        if bias is not None:
            part += bias
        if hidden is not None:
            part.masked_fill_(hidden, -math.inf)
    return logits
