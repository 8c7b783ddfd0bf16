"""Calls of torch's own fused attention, ``scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stabmon.capture.callers import nearest_module
from stabmon.capture.function_mode import kernel_dtype
from stabmon.capture.layout import layout
from stabmon.capture.protocol import CaptureSession, bind
from stabmon.records import AttentionCall

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def watch_sdpa(
    session: CaptureSession,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Record a call of ``scaled_dot_product_attention``, then make it."""
    with session.guarded():
        module = nearest_module(session.names)
        if module is not None:
            record_sdpa(session, module, bind(PARAMETERS, args, kwargs))
    return call(*args, **kwargs)


def record_sdpa(
    session: CaptureSession, module: nn.Module, given: Mapping[str, Any], *, adapter: str = "sdpa"
) -> None:
    """Record one call of ``scaled_dot_product_attention`` by ``module``."""
    dtype = kernel_dtype(given["query"])
    session.record(adapter, module, lambda layer: read_sdpa(layer, module, given, dtype))


def read_sdpa(
    layer: str, module: nn.Module, given: Mapping[str, Any], dtype: torch.dtype
) -> AttentionCall:
    """Read a call as torch documents it: ``is_causal`` is aligned at the top left.

    With as many keys as queries, that is the alignment of every other causal mask.

    Args:
        layer: name of the call.
        module: the module that attends.
        given: the call's arguments by name; query ``[..., Q, D]``, key ``[..., K, D]``.
        dtype: dtype in which the kernel multiplies query and key.

    Returns:
        The record, laid out by batch and head.

    Raises:
        ValueError: for nested tensors.
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
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        is_causal = False
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.float()  # other numbers are added
    scale = given.get("scale")
    return AttentionCall(
        layer=layer,
        query=query.to(dtype),
        key=key.to(dtype),
        scale=float(scale if scale is not None else query.shape[-1] ** -0.5),
        is_causal=is_causal,
        mask=mask,
        dtype=dtype,
        module=module,
    )
