"""Calls of torch's FlexAttention: its block mask and score function, written out as a mask or as
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from stabmon.capture.protocol import bind, kernel_dtype, nearest_module
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

flex_operator = torch.ops.higher_order.flex_attention
"""What eager FlexAttention comes down to, as a function mode sees it."""

PARAMETERS = ("query", "key", "value", "score_mod", "block_mask", "scale")
LARGEST = 2**28
"""A score function is written out for at most this many scores (1 GiB in float32)."""


def handle_flex(
    capture: AttentionCapture,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Record a call of the FlexAttention operator, then make it."""
    with capture.guarded():
        module = nearest_module(capture.names)
        if module is not None:
            record_flex(capture, module, bind(PARAMETERS, args, kwargs))
    return function(*args, **kwargs)


def record_flex(capture: AttentionCapture, module: nn.Module, given: Mapping[str, Any]) -> None:
    """Record one call of ``flex_attention`` (or of the operator below it) that ``module`` makes."""
    dtype = kernel_dtype(given["query"])
    capture.record("flex", module, lambda layer: read_flex(layer, module, given, dtype))


def read_flex(
    layer: str, module: nn.Module, given: Mapping[str, Any], dtype: torch.dtype
) -> AttentionCall:
    """Query and key with a dense mask; the scores instead where a score function changes them."""
    query, key, score_mod, scale = (
        given["query"],
        given["key"],
        given.get("score_mod"),
        given.get("scale"),
    )
    mask = dense_mask(given.get("block_mask"), query, key)
    scale = float(scale if scale is not None else query.shape[-1] ** -0.5)
    query, key = query.to(dtype), key.to(dtype).expand(len(query), -1, -1, -1)
    if score_mod is None or getattr(score_mod, "__name__", "") == "_identity":
        return AttentionCall(layer, query, key, scale, mask=mask, dtype=dtype, module=module)
    scores = modified_scores(layer, query, key, scale, score_mod)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return AttentionCall(layer, None, None, scale=1.0, scores=scores, dtype=dtype, module=module)


def dense_mask(block_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A BlockMask, or the tuple that stands for it further down, as bool ``[B or 1, H or 1, Q,
    K]``.
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
    """``score_mod`` of every scaled score, ``[B, H, Q, K]`` float32."""
    (batch, heads, queries, _), keys = query.shape, key.shape[-2]
    if batch * heads * queries * keys > LARGEST:
        raise ValueError(
            f"{layer} changes {batch * heads * queries * keys:.1e} scores by a score_mod, more "
            f"than the {LARGEST:.1e} that are "
            "written out: shorten the batch or sequence, or move what depends on position only "
            "into the block mask"
        )
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores = scale * (query.float() @ key.float().transpose(-1, -2))
    b, h, q, k = (torch.arange(n, device=query.device) for n in (batch, heads, queries, keys))
    function = score_mod
    for level in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        function = torch.vmap(function, in_dims=level)
    return function(scores, b, h, q, k)
