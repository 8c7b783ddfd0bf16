"""``nn.MultiheadAttention`` and all that is built of it, ``nn.TransformerEncoder`` foremost.

Torch's function modes are off inside ``F.multi_head_attention_forward``, so that the two functions
it attends by are replaced in its own namespace while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stabmon.capture.adapters.sdpa import PARAMETERS, record_sdpa
from stabmon.capture.masks.recover import hide
from stabmon.capture.protocol import bind, kernel_dtype, nearest_module
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

LEADING = ("query", "key", "value", "embed_dim_to_check", "num_heads")


def handle_multihead(
    capture: AttentionCapture,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Make a call of ``F.multi_head_attention_forward``, and record the attention inside it."""
    owner = nearest_module(capture.names)
    if owner is None:
        return function(*args, **kwargs)
    module = owner
    heads = bind(LEADING, args, kwargs)["num_heads"]
    sdpa, softmax = functional.scaled_dot_product_attention, functional.softmax

    def watched_sdpa(*args: Any, **kwargs: Any) -> Any:
        if capture.is_recording():
            with capture.guarded():
                record_sdpa(capture, module, bind(PARAMETERS, args, kwargs), adapter="multihead")
        return sdpa(*args, **kwargs)

    def watched_softmax(input: Any, *args: Any, **kwargs: Any) -> Any:
        if capture.is_recording():
            with capture.guarded():
                dtype = kernel_dtype(input)
                capture.record(
                    "multihead",
                    module,
                    lambda layer: read_scores(layer, module, input, heads, dtype),
                )
        return softmax(input, *args, **kwargs)

    functional.scaled_dot_product_attention = watched_sdpa
    functional.softmax = watched_softmax
    try:
        return function(*args, **kwargs)
    finally:
        functional.scaled_dot_product_attention, functional.softmax = sdpa, softmax


def read_scores(
    layer: str, module: nn.Module, scores: Tensor, heads: int, dtype: torch.dtype
) -> AttentionCall:
    """The scores that are formed where the weights are asked for, ``[B * H, Q, K]``."""
    shown = hide(scores.unflatten(0, (-1, heads)))
    return AttentionCall(
        layer, None, None, scale=1.0, scores=shown, dtype=dtype, fused=False, module=module
    )
