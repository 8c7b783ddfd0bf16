"""Masks that hide keys by a finite number too low for any score to make up for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stabmon.capture.provenance.cells import NEGLIGIBLE, far_below
from stabmon.records import AttentionCall


def hide_unreachable(call: AttentionCall) -> AttentionCall:
    """Hide the masked keys of a call that no score of their row can bring back.

    A score is at most scale * |q| * |k| in size. So a key has no influence whose mask lies below
    another's by twice that, and by :data:`NEGLIGIBLE` more, whatever query and key are.

    Args:
        call: a record with an additive mask; every other is returned as it is.

    Returns:
        The record with a bool mask where nothing but hidden keys is left of it, else with those
        keys at -inf.
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
    """Return the largest size that scores of a row can have.

    Its shape is ``[B, H, Q, 1]``, with size 1 where the mask's is.
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
