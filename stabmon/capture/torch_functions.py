"""Attention of any model, seen as the torch functions it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stabmon.capture.base import kernel_dtype
from stabmon.capture.names import ModuleNames
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture


class TorchFunctions:
    """Watches the torch functions that attention is made of, in the thread that entered."""

    name = "functions"
    looks_for = "torch's scaled_dot_product_attention"

    @contextmanager
    def installed(self, capture: AttentionCapture) -> Iterator[None]:
        """A mode on torch's stack for as long as it is entered."""
        with FunctionWatch(capture):
            yield


class FunctionWatch(TorchFunctionMode):
    """Hands every call of a known function to what reads it; changes nothing."""

    def __init__(self, capture: AttentionCapture) -> None:
        super().__init__()
        self.capture = capture

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self.capture.listening():
            module = nearest_module(sys._getframe(1), self.capture.names)
            if module is not None:
                record_sdpa(self.capture, module, args, kwargs)
        return func(*args, **kwargs)


SDPA_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def record_sdpa(capture: AttentionCapture, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Record one call of ``scaled_dot_product_attention``."""
    given = dict(zip(SDPA_PARAMETERS, args, strict=False), **kwargs)
    dtype = kernel_dtype(given["query"])
    capture.record("sdpa", module, lambda layer: read_sdpa(layer, module, given, dtype))


def read_sdpa(layer: str, module: nn.Module, given: Mapping[str, Any], dtype: torch.dtype) -> AttentionCall:
    """The call as documented: its causal mask is aligned at the top left, which is the same for as many keys as queries."""
    query, key = four_dimensional(given["query"]), four_dimensional(given["key"])
    mask, is_causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    queries, keys = query.shape[-2], key.shape[-2]
    if is_causal and queries != keys:
        mask, is_causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(), False
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


def four_dimensional(tensor: Tensor) -> Tensor:
    """``[..., H, L, D]`` as ``[B, H, L, D]``: leading dimensions folded or added."""
    while tensor.ndim < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


def nearest_module(frame: FrameType | None, names: ModuleNames) -> nn.Module | None:
    """The module whose method the nearest frame is; None where that is none of the model's."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner if owner in names else None
        frame = frame.f_back
    return None
