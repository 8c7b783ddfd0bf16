"""Calls of torch's FlexAttention, with block mask and score function written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from stabmon.capture.callers import nearest_module
from stabmon.capture.function_mode import kernel_dtype
from stabmon.capture.protocol import CaptureSession, bind
from stabmon.records import AttentionCall

flex_operator = torch.ops.higher_order.flex_attention
"""Operator below ``flex_attention``, which is what a function mode sees of it in eager code."""

PARAMETERS = ("query", "key", "value", "score_mod", "block_mask", "scale")
LARGEST = 2**28
"""Most scores for which a score function is written out (1 GiB in float32)."""


def watch_flex(
    session: CaptureSession,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Record a call of the FlexAttention operator, then make it."""
    with session.guarded():
        module = nearest_module(session.names)
        if module is not None:
            record_flex(session, module, bind(PARAMETERS, args, kwargs))
    return call(*args, **kwargs)


def record_flex(session: CaptureSession, module: nn.Module, given: Mapping[str, Any]) -> None:
    """Record a call of ``flex_attention``, or of the operator below it, by ``module``."""
    dtype = kernel_dtype(given["query"])
    session.record("flex", module, lambda layer: read_flex(layer, module, given, dtype))


def read_flex(
    layer: str, module: nn.Module, given: Mapping[str, Any], dtype: torch.dtype
) -> AttentionCall:
    """Read a call as query, key and dense mask, or as scores.

    Scores are read where a score function changes them.

    Args:
        layer: name of the call.
        module: the module that attends.
        given: the call's arguments by name.
        dtype: dtype in which the kernel multiplies query and key.

    Raises:
        ValueError: where more than ``LARGEST`` scores would have to be written out.
    """
    query, key = given["query"], given["key"]
    score_mod, scale = given.get("score_mod"), given.get("scale")
    mask = dense_mask(given.get("block_mask"), query, key)
    scale = float(scale if scale is not None else query.shape[-1] ** -0.5)
    query, key = query.to(dtype), key.to(dtype).expand(len(query), -1, -1, -1)
    # torch passes a function of this name down where the caller gave none (torch 2.13)
    if score_mod is None or getattr(score_mod, "__name__", "") == "_identity":
        return AttentionCall(layer, query, key, scale, mask=mask, dtype=dtype, module=module)
    scores = modified_scores(layer, query, key, scale, score_mod)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return AttentionCall(layer, None, None, scale=1.0, scores=scores, dtype=dtype, module=module)


def dense_mask(block_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """Return a block mask as bool ``[B or 1, H or 1, Q, K]``, None if all is visible.

    Args:
        block_mask: a ``BlockMask``, the tuple that stands for it further down, or None.
        query: ``[B, H, Q, D]``.
        key: ``[B, H_kv, K, D]``.
    """
    if block_mask is None:
        return None
    if isinstance(block_mask, tuple):
        blocks = next(part for part in block_mask if isinstance(part, Tensor))
        mask_mod = block_mask[-1]
    else:
        blocks, mask_mod = block_mask.kv_num_blocks, block_mask.mask_mod
    if getattr(mask_mod, "__name__", "") == "noop_mask":
        return None
    batch, heads = blocks.shape[:2]
    return flex.create_mask(
        mask_mod, batch, heads, query.shape[-2], key.shape[-2], device=query.device
    )


def modified_scores(
    layer: str, query: Tensor, key: Tensor, scale: float, score_mod: Callable[..., Tensor]
) -> Tensor:
    """Return ``score_mod`` of every scaled score, ``[B, H, Q, K]`` float32."""
    (batch, heads, queries, _), keys = query.shape, key.shape[-2]
    if batch * heads * queries * keys > LARGEST:
        raise ValueError(
            f"{layer} changes {batch * heads * queries * keys:.1e} scores by a score_mod, more "
            f"than the {LARGEST:.1e} that are written out: shorten the batch or sequence, or move "
            "what depends on position only into the block mask"
        )
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores = scale * (query.float() @ key.float().transpose(-1, -2))
    places = [torch.arange(n, device=query.device) for n in (batch, heads, queries, keys)]
    function = score_mod
    for dim in reversed(range(4)):  # keys innermost; the scores lose a dimension at each level
        function = torch.vmap(function, in_dims=(0, *(0 if d == dim else None for d in range(4))))
    return function(scores, *places)
