"""Masks that hide keys by a finite number, which no score of the row can make up for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stabmon.records import AttentionCall

NEGLIGIBLE = 16.0
"""A masked key this many nats, and ln of the number of keys, below the largest visible score of its
row has no influence: together they hold less than 2e-7 of the probability."""

CLEAR = 10.0
"""Values fall into visible and masked ones where the gap between the two is this many times as wide
as the visible ones are spread.
"""

LEVELS = 4
"""Masks that were added to each other give several levels of masked values; this many are looked
for.
"""


def far_below(values: Tensor) -> Tensor | None:
    """Where an additive mask masks: far below all other values, which differ little among
    themselves (0 and -1e4); None for nowhere.

    A bias that falls steadily, as one by distance does, has no such gap.
    """
    masked = values <= torch.finfo(values.dtype).min / 2
    high = values.amax()
    left = torch.where(masked, high, values)
    found = False
    for _ in range(LEVELS):
        low = left.amin()
        if not bool((high - low > NEGLIGIBLE).item()):
            break
        upper = left > high - (high - low) / 4
        least = left.masked_fill(~upper, torch.inf).amin()
        most = left.masked_fill(upper, -torch.inf).amax()
        if not bool((least - most > CLEAR * (high - least)).item()):
            break
        masked, left, found = masked | ~upper, torch.where(upper, left, high), True
    return masked if found else None


def hide_unreachable(call: AttentionCall) -> AttentionCall:
    """The call with those masked keys hidden that no score of their row can bring back, however
    query and key may lie.

    A score is at most scale * |q| * |k| in size, so that a key whose mask lies that much below
    another's twice over, and :data:`NEGLIGIBLE` below that, has no influence.
    """
    mask = call.mask
    if (
        mask is None
        or call.query is None
        or call.key is None
        or not mask.is_floating_point()
        or mask.ndim > 4
    ):
        return call
    masked = far_below(mask)
    if masked is None:
        return call
    mask = mask[(None,) * (4 - mask.ndim)]
    masked = masked.view(mask.shape)
    top = mask.masked_fill(masked, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top.isneginf(), mask.masked_fill(masked, -torch.inf).amax(), top)
    limit = top - 2 * reach(call, mask) - NEGLIGIBLE - math.log(max(1, mask.shape[-1]))
    hidden = masked & (mask <= limit)
    if bool((hidden | (mask == 0)).all().item()):
        return replace(call, mask=~hidden)
    return replace(call, mask=mask.masked_fill(hidden, -torch.inf))


def reach(call: AttentionCall, mask: Tensor) -> Tensor:
    """The largest size that scores of a row can have, ``[B, H, Q, 1]``, of size 1 where the mask's
    is.
    """
    assert call.query is not None
    assert call.key is not None
    longest = (
        call.key.float()
        .norm(dim=-1)
        .amax(-1)
        .repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    )
    bound: Tensor = abs(call.scale) * call.query.float().norm(dim=-1) * longest[..., None]
    if call.softcap is not None:
        bound = bound.clamp(max=call.softcap)
    for d in range(3):
        if mask.shape[d] == 1:
            bound = bound.amax(d, keepdim=True)
    return bound[..., None]
