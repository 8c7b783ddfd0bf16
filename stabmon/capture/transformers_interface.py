"""Attention of transformers models, seen where they look up their attention function at every forward."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stabmon.capture.base import kernel_dtype
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

Kernel = Callable[..., Any]
Arguments = Mapping[str, Any]

PARAMETERS = ("module", "query", "key", "value", "attention_mask", "scaling", "dropout")
"""What the first arguments of every attention function of transformers are called, in order."""


class TransformersInterface:
    """Wraps what ``AttentionInterface.get_interface`` returns, where transformers has been imported."""

    name = "transformers"
    looks_for = "models that call transformers' AttentionInterface (eager, sdpa, flex, flash)"

    @contextmanager
    def installed(self, capture: AttentionCapture) -> Iterator[None]:
        """Replaces the class's lookup for as long as it is entered."""
        library = sys.modules.get("transformers.modeling_utils")
        interface: Any = getattr(library, "AttentionInterface", None)
        original = getattr(interface, "get_interface", None)
        if original is None:
            yield
            return

        @functools.wraps(original)
        def get_interface(self: Any, implementation: str, default: Kernel) -> Kernel:
            kernel: Kernel = original(self, implementation, default)
            read = reader(kernel, default)
            return watched(kernel, read, capture) if read is not None and capture.listening() else kernel

        interface.get_interface = get_interface
        try:
            yield
        finally:
            interface.get_interface = original


Reader = Callable[[str, Arguments, torch.dtype], AttentionCall]


def watched(kernel: Kernel, read: Reader, capture: AttentionCapture) -> Kernel:
    """``kernel``, preceded by a look at what it is called with."""

    @functools.wraps(kernel)
    def attention(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(PARAMETERS, args, strict=False)) | kwargs
        module: Any = given.get("module")
        query: Any = given.get("query")
        known = isinstance(module, nn.Module) and module in capture.names and isinstance(query, Tensor) and query.ndim == 4
        if not known or not capture.listening():
            return kernel(*args, **kwargs)
        dtype = kernel_dtype(query)
        capture.record("transformers", module, lambda layer: read(layer, given, dtype))
        with capture.inside():
            return kernel(*args, **kwargs)

    return attention


def reader(kernel: Kernel, default: Kernel) -> Reader | None:
    """How to read a call of ``kernel``; None where its meaning is not known, and torch functions have to be watched."""
    if not getattr(kernel, "__module__", "").startswith("transformers."):
        return None
    if kernel is default:
        return functools.partial(read_eager, kernel)
    return {"sdpa_attention_forward": read_sdpa}.get(kernel.__name__)


def read_sdpa(layer: str, given: Arguments, dtype: torch.dtype) -> AttentionCall:
    """As ``sdpa_attention_forward`` resolves it: causal only without a mask and with more than one query."""
    query, key, mask, bias = given["query"], given["key"], given.get("attention_mask"), given.get("position_bias")
    is_causal = given.get("is_causal")
    is_causal = bool(getattr(given["module"], "is_causal", True) if is_causal is None else is_causal)
    is_causal = is_causal and query.shape[2] > 1 and mask is None
    if is_causal and key.shape[2] > query.shape[2]:  # an empty static cache: the kernel gets the first keys alone
        key = key[:, :, : query.shape[2]]
        bias = bias[..., : query.shape[2]] if bias is not None else None
    return make_call(layer, given, dtype, key=key, mask=biased(mask, bias), is_causal=is_causal)


def read_eager(kernel: Kernel, layer: str, given: Arguments, dtype: torch.dtype) -> AttentionCall:
    """The mask is added and says everything; soft cap, bias and sinks count where the model's own function reads them."""
    code = kernel.__code__
    taken = {name: given.get(name) for name in ("softcap", "position_bias", "s_aux") if name in code.co_varnames}
    sinks = getattr(given["module"], "sinks", None) if "sinks" in code.co_names else taken.get("s_aux")
    mask = given.get("attention_mask")
    if mask is not None and not mask.is_floating_point():
        mask = mask.to(dtype)  # an eager kernel adds its mask, whatever it is
    mask = biased(mask, taken.get("position_bias"))
    return make_call(layer, given, dtype, mask=mask, softcap=taken.get("softcap"), sinks=sinks, fused=False)


def biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Mask and position bias as one additive mask."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def make_call(
    layer: str, given: Arguments, dtype: torch.dtype, *, key: Tensor | None = None, sinks: Tensor | None = None, **read: Any
) -> AttentionCall:
    """The record of one call, with query and key in the dtype in which the kernel multiplies them."""
    query = given["query"]
    key = given["key"] if key is None else key
    scaling = given.get("scaling")
    module: nn.Module = given["module"]
    return AttentionCall(
        layer=layer,
        query=query.to(dtype),
        key=key.to(dtype),
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        sinks=sinks.reshape(-1) if sinks is not None else None,
        dtype=dtype,
        module=module,
        **read,
    )
