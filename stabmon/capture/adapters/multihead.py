"""Calls of ``nn.MultiheadAttention``, and of all that is built of it.

Torch's function modes are off inside ``F.multi_head_attention_forward``, so the two functions by
which it attends are replaced in its own namespace while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stabmon.capture.adapters.sdpa import PARAMETERS, record_sdpa
from stabmon.capture.callers import nearest_module
from stabmon.capture.function_mode import kernel_dtype
from stabmon.capture.masks.recover import is_hidden
from stabmon.capture.model_call import Watched
from stabmon.capture.protocol import CaptureSession, bind
from stabmon.records import AttentionCall

LEADING = ("query", "key", "value", "embed_dim_to_check", "num_heads")


def watch_multihead(
    session: CaptureSession,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Make a call of ``F.multi_head_attention_forward`` and record its attention."""
    owner = nearest_module(session.names)
    if owner is None:
        return call(*args, **kwargs)
    module = owner
    heads = bind(LEADING, args, kwargs)["num_heads"]

    def watch_inner_sdpa(
        session: CaptureSession, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if session.is_recording():
            with session.guarded():
                record_sdpa(session, module, bind(PARAMETERS, args, kwargs), adapter="multihead")
        return call(*args, **kwargs)

    def watch_inner_softmax(
        session: CaptureSession, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if session.is_recording():
            with session.guarded():
                scores = bind(("input",), args, kwargs)["input"]
                dtype = kernel_dtype(scores)
                session.record(
                    "multihead",
                    module,
                    lambda layer: read_scores(layer, module, scores, heads, dtype),
                )
        return call(*args, **kwargs)

    sdpa, softmax = functional.scaled_dot_product_attention, functional.softmax
    functional.scaled_dot_product_attention = Watched(session, sdpa, watch_inner_sdpa)
    functional.softmax = Watched(session, softmax, watch_inner_softmax)
    try:
        return call(*args, **kwargs)
    finally:
        functional.scaled_dot_product_attention, functional.softmax = sdpa, softmax


def read_scores(
    layer: str, module: nn.Module, scores: Tensor, heads: int, dtype: torch.dtype
) -> AttentionCall:
    """Read the scores ``[B * H, Q, K]``, formed where weights are asked for."""
    scores = scores.unflatten(0, (-1, heads))
    shown = scores.masked_fill(is_hidden(scores), -torch.inf)
    return AttentionCall(
        layer, None, None, scale=1.0, scores=shown, dtype=dtype, fused=False, module=module
    )
