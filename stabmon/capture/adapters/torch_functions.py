"""Attention of any model, seen as the torch functions it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from stabmon.capture.adapters.flex import flex_operator, handle_flex
from stabmon.capture.adapters.multihead import handle_multihead
from stabmon.capture.adapters.sdpa import handle_sdpa
from stabmon.capture.adapters.softmax import handle_softmax, record_softmax
from stabmon.capture.protocol import Handler, nearest_module
from stabmon.capture.provenance.mode import Provenance
from stabmon.capture.provenance.operations import operation

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

HANDLERS: dict[Any, Handler] = {
    functional.scaled_dot_product_attention: handle_sdpa,
    functional.multi_head_attention_forward: handle_multihead,
    flex_operator: handle_flex,
}


class FunctionWatch(TorchFunctionMode):
    """Hands every call of a known function to what reads it; changes nothing. Acts in the thread
    that pushed it.
    """

    looks_for = (
        "torch's scaled_dot_product_attention, multi_head_attention_forward and flex_attention; "
        "a softmax over a product of queries and keys, whose result is used as weights"
    )

    def __init__(self, capture: AttentionCapture) -> None:
        super().__init__()
        self.capture = capture
        self.provenance = Provenance(
            lambda softmax, weights: record_softmax(capture, softmax, weights),
            lambda: nearest_module(capture.names),
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.capture.is_recording():
            return func(*args, **kwargs)
        made = operation(func, args, kwargs)
        if made.name == "softmax":
            return handle_softmax(self.capture, self.provenance, func, args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self.capture, func, args, kwargs)
        if (
            torch._C._functorch.peek_interpreter_stack() is not None
        ):  # private: vmap and grad wrap tensors; checked in torch 2.13
            return func(*args, **kwargs)
        with self.capture.guarded():
            self.provenance.before(made)
        result = func(*args, **kwargs)
        with self.capture.guarded():
            self.provenance.after(made, result)
        return result


@contextmanager
def taken_off(mode: TorchFunctionMode | None) -> Iterator[None]:
    """``mode`` is off, where it lies on top of torch's stack."""
    if mode is None or _get_current_function_mode() is not mode:
        yield
        return
    _pop_mode()
    try:
        yield
    finally:
        _push_mode(mode)


def push(mode: TorchFunctionMode) -> None:
    """Put ``mode`` on top of torch's stack."""
    _push_mode(mode)


def remove(mode: TorchFunctionMode | None) -> bool:
    """Take ``mode`` off torch's stack, leave what others have put on top of it, and tell whether it
    was there.
    """
    if mode is None or not any(mode is other for other in _get_current_function_mode_stack()):
        return False
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    return True
