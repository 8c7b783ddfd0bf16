"""Attention of any model, seen in the torch functions that it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stabmon.capture.adapters.flex import flex_operator, watch_flex
from stabmon.capture.adapters.multihead import watch_multihead
from stabmon.capture.adapters.sdpa import watch_sdpa
from stabmon.capture.adapters.softmax import record_softmax, watch_softmax
from stabmon.capture.callers import nearest_module
from stabmon.capture.model_call import ModelCall, result_of
from stabmon.capture.protocol import CaptureSession, Watcher
from stabmon.capture.provenance.operations import operation
from stabmon.capture.provenance.tracker import Provenance

WATCHERS: dict[Any, Watcher] = {
    functional.scaled_dot_product_attention: watch_sdpa,
    functional.multi_head_attention_forward: watch_multihead,
    flex_operator: watch_flex,
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
        call = None
        try:
            call = ModelCall(func)
            return self.watch(call, func, args, kwargs)
        except Exception as error:
            if call is not None and call.has_raised:
                raise
            self.session.failed(error)
        return result_of(call, func, args, kwargs)

    def watch(
        self,
        call: ModelCall,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Make a call, and record it where it is attention.

        Args:
            call: the call.
            function: what is called.
            args: positional arguments.
            kwargs: named arguments.

        Returns:
            The result of the call.
        """
        if not self.session.is_recording():
            return call(*args, **kwargs)
        made = operation(function, args, kwargs)
        if made.name == "softmax":
            return watch_softmax(self.session, self.provenance, call, args, kwargs)
        watcher = WATCHERS.get(function)
        if watcher is not None:
            return watcher(self.session, call, args, kwargs)
        # Private, checked with torch 2.13: the innermost of vmap and grad, None outside of both.
        # They wrap tensors, whose memory and strides say nothing then. If it goes, attention inside
        # vmap would be followed by wrong strides.
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return call(*args, **kwargs)
        with self.session.guarded():
            self.provenance.before(made)
        result = call(*args, **kwargs)
        with self.session.guarded():
            self.provenance.after(made, result)
        return result
