"""Masks of attention calls over the keys still held by a compressed cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabmon.capture.intercept import AttentionSite


def masked_arguments(
    site: AttentionSite, positions: Tensor, seen: int, *, has_gaps: bool
) -> dict[str, Any]:
    """Return the call's arguments, adapted to the held keys.

    Args:
        site: the call; its mask covers all ``seen`` keys and its key tensor holds M of them.
        positions: ``[B, H_kv, M]`` of the keys, -1 for empty slots.
        seen: keys in all, the new queries' own included; the queries are the last of them.
        has_gaps: True if some slot is empty.

    Returns:
        Changes for ``site.run`` and ``site.read``; empty if the call is right as it is.

    Raises:
        ValueError: for a kernel or mask that cannot express the missing keys.
    """
    given = site.arguments
    query, mask = given["query"], given.get("attention_mask")
    groups = query.shape[1] // positions.shape[1]
    changes: dict[str, Any] = {}
    if given.get("position_bias") is not None:
        changes["position_bias"] = gathered(given["position_bias"], positions, groups)
    if mask is None and query.shape[2] == 1 and not has_gaps:
        return changes
    kernel = getattr(site.kernel, "__name__", "")
    if "flash" in kernel:
        raise ValueError(
            f"{site.layer} runs {kernel}, which takes no mask per key: load the model with "
            "attn_implementation='sdpa'"
        )
    if mask is None:
        visible = held_and_past(positions, seen, query.shape[2]).repeat_interleave(groups, dim=1)
        is_eager = site.kind == "transformers" and kernel != "sdpa_attention_forward"
        changes["attention_mask"] = additive(visible, query.dtype) if is_eager else visible
    elif isinstance(mask, Tensor):
        if mask.ndim != 4 or mask.shape[-1] < seen:
            raise ValueError(
                f"{site.layer} got a mask of shape {tuple(mask.shape)} where [B, 1 or H, "
                f"{query.shape[2]}, {seen} or more] was expected: give attention_mask for the "
                "whole sequence, evicted tokens included"
            )
        picked = gathered(mask, positions, groups)
        if has_gaps:
            empty = (positions < 0).repeat_interleave(groups, dim=1)[:, :, None]
            picked = picked.masked_fill(
                empty, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            )
        changes["attention_mask"] = picked
    else:
        changes["attention_mask"] = flex_mask(mask, positions, groups, query)
    return changes


def gathered(values: Tensor, positions: Tensor, groups: int) -> Tensor:
    """Select the mask columns of the held keys.

    Args:
        values: ``[B or 1, 1 or H, Q, K]``.
        positions: ``[B, H_kv, M]``; for empty slots any column is taken.
        groups: query heads per key head.

    Returns:
        ``[B, H, Q, M]``.
    """
    index = positions.clamp(min=0)
    if values.shape[1] > 1:
        index = index.repeat_interleave(groups, dim=1)
    wide = values.expand(index.shape[0], index.shape[1], -1, -1)
    picked = wide.gather(-1, index[:, :, None].expand(-1, -1, wide.shape[2], -1))
    return picked if values.shape[1] > 1 else picked.repeat_interleave(groups, dim=1)


def held_and_past(positions: Tensor, seen: int, queries: int) -> Tensor:
    """Mark the held keys at or before each query, ``[B, H_kv, Q, M]`` bool.

    Args:
        positions: ``[B, H_kv, M]``, -1 for empty slots.
        seen: keys in all; the queries are the last of them.
        queries: number of queries, Q.
    """
    own = torch.arange(seen - queries, seen, device=positions.device)
    place = positions[:, :, None]
    return (place >= 0) & (place <= own[:, None])


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 for visible keys, and the lowest number of ``dtype`` for others.

    Args:
        visible: bool mask of any shape.
        dtype: format of the result.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def flex_mask(mask: Any, positions: Tensor, groups: int, query: Tensor) -> Any:
    """Return a ``BlockMask`` with the given one's values at the held keys' positions.

    ``create_block_mask`` and ``BlockMask.mask_mod`` were checked with torch 2.13.

    Args:
        mask: the model's own ``BlockMask``.
        positions: ``[B, H_kv, M]``, -1 for empty slots.
        groups: query heads per key head.
        query: ``[B, H, Q, D]``, for its shape and device.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    asked = mask.mask_mod

    def at_positions(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        place = positions[batch, head // groups, slot]
        visible: Tensor = asked(batch, head, row, place.clamp(min=0))
        return visible & (place >= 0)

    heads = query.shape[1]
    return create_block_mask(
        at_positions,
        len(positions),
        heads,
        query.shape[2],
        positions.shape[2],
        device=str(query.device),
    )
