"""Arguments of transformers' attention functions, read as each function uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture.adapters.flex import dense_mask
from stabmon.records import AttentionCall

Kernel = Callable[..., Any]
Arguments = Mapping[str, Any]
Reader = Callable[[str, Arguments, torch.dtype], AttentionCall]
"""``(layer, arguments by name, dtype of the product) -> call``."""

PARAMETERS = ("module", "query", "key", "value", "attention_mask", "scaling", "dropout")
"""Leading parameters of every attention function of transformers, in order (5.23)."""


def reader(kernel: Kernel, default: Kernel) -> Reader | None:
    """Return the reader of calls of ``kernel``, None where its meaning is not known.

    Torch functions have to be watched then. A kernel that changes attention before it runs reads
    its calls itself, by a method ``read_call``.

    Args:
        kernel: the attention function that the model has looked up.
        default: the model's own eager function.
    """
    own: Reader | None = getattr(kernel, "read_call", None)
    if own is not None:
        return own
    if not getattr(kernel, "__module__", "").startswith("transformers.") or not hasattr(
        kernel, "__code__"
    ):
        return None
    if kernel is default:
        return functools.partial(read_eager, kernel)
    # checked with transformers 5.23: under other names they are watched as torch functions
    known = {
        "sdpa_attention_forward": read_sdpa,
        "flex_attention_forward": read_flex,
        "flash_attention_forward": read_flash,
    }
    return known.get(kernel.__name__)


def read_eager(kernel: Kernel, layer: str, given: Arguments, dtype: torch.dtype) -> AttentionCall:
    """Read a call of a model's own eager function.

    It adds its mask, and is causal only by it. Softcap, bias and sinks count where the code of that
    function uses them.
    """
    code = kernel.__code__
    taken = {
        name: given.get(name)
        for name in ("softcap", "position_bias", "s_aux", "sinks")
        if name in code.co_varnames
    }
    sinks = (
        given["module"].sinks
        if "sinks" in code.co_names
        else taken.get("s_aux", taken.get("sinks"))
    )
    mask = given.get("attention_mask")
    if mask is not None and not mask.is_floating_point():
        mask = mask.to(dtype)  # an eager function adds its mask, whatever it is
    mask = biased(mask, taken.get("position_bias"))
    return make_call(
        layer, given, dtype, mask=mask, softcap=taken.get("softcap"), sinks=sinks, fused=False
    )


def read_sdpa(layer: str, given: Arguments, dtype: torch.dtype) -> AttentionCall:
    """Read a call as ``sdpa_attention_forward`` resolves it.

    It is causal only without a mask and with more than one query.
    """
    query, key = given["query"], given["key"]
    mask, bias = given.get("attention_mask"), given.get("position_bias")
    is_causal = causal_flag(given) and query.shape[2] > 1 and mask is None
    # an empty static cache: the kernel gets the first keys alone
    if is_causal and key.shape[2] > query.shape[2]:
        key = key[:, :, : query.shape[2]]
        bias = bias[..., : query.shape[2]] if bias is not None else None
    return make_call(layer, given, dtype, key=key, mask=biased(mask, bias), is_causal=is_causal)


def read_flex(layer: str, given: Arguments, dtype: torch.dtype) -> AttentionCall:
    """Read a call of FlexAttention, its block mask written out.

    Of an additive mask the kernel reads the first head's alone.
    """
    mask, query, key = given.get("attention_mask"), given["query"], given["key"]
    mask = (
        mask[:, :1, :, : key.shape[-2]]
        if isinstance(mask, Tensor)
        else dense_mask(mask, query, key)
    )
    mask = biased(mask, given.get("position_bias"))
    return make_call(
        layer, given, dtype, mask=mask, softcap=given.get("softcap"), sinks=given.get("s_aux")
    )


def read_flash(layer: str, given: Arguments, dtype: torch.dtype) -> AttentionCall:
    """Read a call of FlashAttention with padding ``[B, K]``, packing and a window.

    Its causal mask is aligned at the bottom right.
    """
    query, key, window = given["query"], given["key"], given.get("sliding_window")
    queries, keys = query.shape[2], key.shape[2]
    # these kernels take half precision only, and transformers casts to the weights' dtype
    if dtype == torch.float32:
        linear = (each for each in given["module"].modules() if isinstance(each, nn.Linear))
        dtype = next((each.weight.dtype for each in linear), dtype)
    padding, segments = given.get("attention_mask"), packed_segments(given)
    mask = None
    if padding is not None:
        visible = padding.bool()
        mask = visible[:, None, -queries:, None] & visible[:, None, None, -keys:]
    elif segments is not None:
        mask = (segments[-queries:, None] == segments[None, :])[None, None]
    is_causal = causal_flag(given)
    window = window if window is not None and keys > window else None
    if window is not None and not is_causal:
        place = torch.arange(keys, device=key.device)
        near = (place[keys - queries :, None] - place).abs() < window
        mask, window = near if mask is None else mask & near, None
    sinks, softcap = given.get("s_aux"), given.get("softcap") or None
    return make_call(
        layer,
        given,
        dtype,
        mask=mask,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def packed_segments(given: Arguments) -> Tensor | None:
    """Return the index of each key's packed sequence ``[K]``, None where there is one."""
    ends, positions = given.get("cu_seq_lens_k"), given.get("position_ids")
    if ends is not None and given.get("max_length_k") is not None:
        place = torch.arange(given["key"].shape[2], device=ends.device)
        return torch.searchsorted(ends[1:].contiguous(), place, right=True)
    if (
        positions is None
        or len(given["query"]) != 1
        or positions.shape[-1] == 1
        or positions.ndim != 2
    ):
        return None
    starts = positions[0] == positions.min()
    return starts.long().cumsum(0) if bool((starts.sum() > 1).item()) else None


def causal_flag(given: Arguments) -> bool:
    """Return causality as the caller states it, else as the module does, else True."""
    given_flag = given.get("is_causal")
    return bool(getattr(given["module"], "is_causal", True) if given_flag is None else given_flag)


def biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return mask and position bias as one additive mask."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return (bias + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def make_call(
    layer: str,
    given: Arguments,
    dtype: torch.dtype,
    *,
    key: Tensor | None = None,
    sinks: Tensor | None = None,
    **read: Any,
) -> AttentionCall:
    """Return the record of one call.

    Args:
        layer: name of the call.
        given: the call's arguments by name.
        dtype: dtype in which the kernel multiplies query and key.
        key: replaces the key among the arguments.
        sinks: sink logits, see :func:`sinks_of`.
        **read: further fields of the record.
    """
    query = given["query"]
    key = given["key"] if key is None else key
    batch = max(len(query), len(key))
    scaling = given.get("scaling")
    return AttentionCall(
        layer=layer,
        query=query.to(dtype).expand(batch, -1, -1, -1),
        key=key.to(dtype).expand(batch, -1, -1, -1),
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        sinks=sinks_of(layer, sinks, query, batch) if sinks is not None else None,
        dtype=dtype,
        module=given["module"],
        **read,
    )


def sinks_of(layer: str, sinks: Tensor, query: Tensor, batch: int) -> Tensor:
    """Return sink logits as ``[H]``, one per head, or ``[B, H, Q]``, one per row.

    Raises:
        ValueError: for sink logits of any other shape.
    """
    rows = query.shape[:3]
    if sinks.numel() == query.shape[1]:
        return sinks.reshape(-1)
    if sinks.shape in (rows, (*rows, 1)):
        return sinks.reshape(rows).expand(batch, -1, -1)
    raise ValueError(
        f"{layer} has sink logits of shape {tuple(sinks.shape)}: only one per head or one "
        f"per row {list(rows)} can be read"
    )
