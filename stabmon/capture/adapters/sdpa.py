"""Calls of torch's own fused attention function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stabmon.capture.protocol import bind, kernel_dtype, layout, nearest_module
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def handle_sdpa(
    capture: AttentionCapture,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Record a call of ``scaled_dot_product_attention``, then make it."""
    with capture.guarded():
        module = nearest_module(capture.names)
        if module is not None:
            record_sdpa(capture, module, bind(PARAMETERS, args, kwargs))
    return function(*args, **kwargs)


def record_sdpa(
    capture: AttentionCapture, module: nn.Module, given: Mapping[str, Any], *, adapter: str = "sdpa"
) -> None:
    """Record one call of ``scaled_dot_product_attention`` that ``module`` makes."""
    dtype = kernel_dtype(given["query"])
    capture.record(adapter, module, lambda layer: read_sdpa(layer, module, given, dtype))


def read_sdpa(
    layer: str, module: nn.Module, given: Mapping[str, Any], dtype: torch.dtype
) -> AttentionCall:
    """The call as documented: its causal mask is aligned at the top left, which is the same for as
    many keys as queries.
    """
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if query.is_nested:
        raise ValueError(
            f"{layer} attends over nested tensors, which cannot be read: give it padded tensors "
            "and a mask"
        )
    lay_out = layout(query.shape, module, operand=query)
    if mask is not None and mask.ndim > 2 and query.ndim != 4:
        mask = lay_out(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    query, key = lay_out(query), lay_out(key)
    query = query.expand(max(len(query), len(key)), -1, -1, -1)
    key = key.expand(len(query), -1, -1, -1)
    queries, keys = query.shape[-2], key.shape[-2]
    is_causal = bool(given.get("is_causal", False))
    if is_causal and queries != keys:
        mask, is_causal = (
            torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(),
            False,
        )
    scale = given.get("scale")
    return AttentionCall(
        layer=layer,
        query=query.to(dtype),
        key=key.to(dtype),
        scale=float(scale if scale is not None else query.shape[-1] ** -0.5),
        is_causal=is_causal,
        mask=additive(mask),
        dtype=dtype,
        module=module,
    )


def additive(mask: Tensor | None) -> Tensor | None:
    """A mask of bools or floats as it is, other numbers as floats to be added."""
    return (
        mask
        if mask is None or mask.dtype == torch.bool or mask.is_floating_point()
        else mask.float()
    )
