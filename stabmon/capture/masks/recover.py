"""Masks recovered by comparing a model's scores with those of query and key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stabmon.capture.provenance.cells import NEGLIGIBLE
from stabmon.capture.provenance.products import FILL, ScoreProvenance
from stabmon.records import AttentionCall

BLOCK = 2**24
"""Scores are compared in blocks of about this many at a time, so that a few blocks are all the
memory it takes.
"""

Block = tuple[slice, slice, Tensor, Tensor, Tensor]
"""Batch entries, heads, and ``[b, h, Q, K]`` each: scores by query and key alone, the model's minus
these, hidden keys.
"""


def recover_mask(
    call: AttentionCall, scores: Tensor, product: ScoreProvenance, query: Tensor, key: Tensor
) -> AttentionCall | None:
    """Return ``call`` with the query, key and mask whose scores are the model's own.

    The mask is none (up to the rounding of their dtypes), one of hidden keys, or, where the model
    has added something, an additive one in float32.

    Args:
        call: the record to complete.
        scores: ``[B, H, Q, K]``, as they go into the softmax.
        product: what is known of how they came about.
        query: ``[B, H, Q, D]``.
        key: ``[B, H_kv, K, D]``.

    Returns:
        The completed record; None where scores differ though the model has added nothing.
    """
    scale = product.scale if product.cap is None else product.scale * product.cap
    call = replace(call, query=query, key=key, scale=scale, softcap=product.cap)
    rounding = 4 * max(torch.finfo(product.dtype).eps, torch.finfo(scores.dtype).eps)
    exact, alike, shown = [], [], []

    def has_no_bias(block: Block) -> Tensor:
        _, _, plain, rest, hidden = block
        size = plain.abs()
        noise = rounding * size + 32 * torch.finfo(torch.float32).eps * size.amax(
            dim=(1, 2, 3), keepdim=True
        )
        return ((rest.abs() <= noise) | hidden).all()

    if scores.shape[0] > 1:  # most biases show in one entry, which spares the others
        one = replace(call, query=query[:1], key=key[:1])
        if not all(bool(has_no_bias(block)) for block in blocks(one, scores[:1], product)):
            return replace(call, mask=difference(call, scores, product)) if product.masked else None
    for block in blocks(call, scores, product):
        _, heads, _, _, hidden = block
        exact.append(has_no_bias(block))
        if heads.start == 0:
            shown.append(~hidden[:, :1])
        alike.append((hidden == ~shown[-1]).all())
    if not exact:
        return call
    if not all(torch.stack(exact).tolist()):
        return replace(call, mask=difference(call, scores, product)) if product.masked else None
    visible = torch.cat(shown)
    if not all(torch.stack(alike).tolist()):
        visible = torch.empty_like(scores, dtype=torch.bool)
        for entries, heads, _, _, hidden in blocks(call, scores, product):
            visible[entries, heads] = ~hidden
    if bool(visible.all().item()):
        return call
    queries, keys = scores.shape[-2:]
    lower = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if bool((visible == lower).all().item()):
        return replace(call, is_causal=True)
    return replace(call, mask=visible)


def difference(call: AttentionCall, scores: Tensor, product: ScoreProvenance) -> Tensor:
    """Return all that the model has added, ``[B, H, Q, K]``, hidden keys at -inf."""
    mask = torch.empty_like(scores, dtype=torch.promote_types(torch.float32, scores.dtype))
    for entries, heads, _, rest, hidden in blocks(call, scores, product):
        mask[entries, heads] = rest.masked_fill(hidden, -torch.inf)
    return mask


def blocks(call: AttentionCall, scores: Tensor, product: ScoreProvenance) -> Iterator[Block]:
    """Yield the model's scores block by block, beside those that query and key give.

    A block is a few heads of one batch entry, or all heads of a few entries.
    """
    assert call.query is not None
    assert call.key is not None
    batch, heads, queries, keys = scores.shape
    wide = torch.promote_types(torch.float32, scores.dtype)
    groups = heads // call.key.shape[1]
    pairs = max(1, BLOCK // max(1, queries * keys))
    head_step, batch_step = min(pairs, heads), max(1, pairs // max(1, heads))
    for first in range(0, batch if scores.numel() else 0, batch_step):
        entries = slice(first, min(first + batch_step, batch))
        for start in range(0, heads, head_step):
            some = slice(start, min(start + head_step, heads))
            own = torch.arange(some.start, some.stop, device=scores.device) // groups
            key = call.key[entries, some] if groups == 1 else call.key[entries, own]
            plain = (call.query[entries, some].to(wide) @ key.to(wide).transpose(-1, -2)).mul_(
                call.scale
            )
            if call.softcap is not None:
                plain = call.softcap * torch.tanh(plain / call.softcap)
            part = scores[entries, some]
            rest = part.to(wide) - plain
            hidden = is_hidden(part, product.fills)
            if product.masked:
                hidden = hidden | (rest <= 0.9 * FILL)
            yield entries, some, plain, rest, hidden


def is_hidden(scores: Tensor, fills: tuple[float, ...] = ()) -> Tensor:
    """Return where scores hide a key, as bool of their shape.

    A key is hidden at -inf, beyond half of the lowest number of the dtype, or at a constant that
    the model has filled in.
    """
    hidden = scores <= torch.finfo(scores.dtype).min / 2
    for fill in fills:
        hidden = hidden | (scores == torch.tensor(fill, dtype=scores.dtype, device=scores.device))
    return hidden


def conceal(scores: Tensor, cells: Tensor) -> Tensor:
    """Return scores with masked cells at -inf where no softmax shows the difference.

    Args:
        scores: ``[B, H, Q, K]``.
        cells: where the model has masked them, bool, broadcastable to that shape.
    """
    shown = scores.clone()
    margin = NEGLIGIBLE + math.log(max(1, scores.shape[-1]))
    for entry, masked in zip(shown, cells.expand(scores.shape), strict=True):
        free = ~masked & (entry > torch.finfo(entry.dtype).min / 2)
        top = entry.masked_fill(~free, -torch.inf).amax(-1, keepdim=True)
        least = entry.masked_fill(~free, torch.inf).amin((-1, -2), keepdim=True)
        limit = torch.where(top.isneginf(), least, top) - margin
        entry.masked_fill_(masked & (entry <= limit) & ~least.isposinf(), -torch.inf)
    return shown
