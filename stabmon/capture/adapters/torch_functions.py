"""Attention of any model, seen in the torch functions that it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stabmon.capture.adapters.flex import flex_operator, handle_flex
from stabmon.capture.adapters.multihead import handle_multihead
from stabmon.capture.adapters.sdpa import handle_sdpa
from stabmon.capture.adapters.softmax import handle_softmax, record_softmax
from stabmon.capture.callers import nearest_module
from stabmon.capture.protocol import CaptureSession, Handler
from stabmon.capture.provenance.operations import operation
from stabmon.capture.provenance.tracker import Provenance

HANDLERS: dict[Any, Handler] = {
    functional.scaled_dot_product_attention: handle_sdpa,
    functional.multi_head_attention_forward: handle_multihead,
    flex_operator: handle_flex,
}


class FunctionWatch(TorchFunctionMode):
    """Function mode that hands every call of a known function to its reader.

    It changes nothing, and works in the thread that pushed it alone.
    """

    looks_for = (
        "torch's scaled_dot_product_attention, multi_head_attention_forward and flex_attention; "
        "a softmax over a product of queries and keys, whose result is used as weights"
    )

    def __init__(self, session: CaptureSession) -> None:
        super().__init__()
        self.session = session
        self.provenance = Provenance(
            lambda softmax, weights: record_softmax(session, softmax, weights),
            lambda: nearest_module(session.names),
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.session.is_recording():
            return func(*args, **kwargs)
        made = operation(func, args, kwargs)
        if made.name == "softmax":
            return handle_softmax(self.session, self.provenance, func, args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self.session, func, args, kwargs)
        # Private, checked with torch 2.13: the innermost of vmap and grad, None outside of both.
        # They wrap tensors, whose memory and strides say nothing then. If it goes, attention inside
        # vmap would be followed by wrong strides.
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        with self.session.guarded():
            self.provenance.before(made)
        result = func(*args, **kwargs)
        with self.session.guarded():
            self.provenance.after(made, result)
        return result
