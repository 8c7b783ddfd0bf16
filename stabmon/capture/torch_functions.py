"""Attention of any model, seen as the torch functions it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

from stabmon.capture.base import Handler
from stabmon.capture.flex import flex_operator, handle_flex
from stabmon.capture.multihead import handle_multihead
from stabmon.capture.sdpa import handle_sdpa
from stabmon.capture.softmax import Products, handle_softmax

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

HANDLERS: dict[Any, Handler] = {
    functional.scaled_dot_product_attention: handle_sdpa,
    functional.multi_head_attention_forward: handle_multihead,
    flex_operator: handle_flex,
}


class TorchFunctions:
    """Watches the torch functions that attention is made of, in the thread that entered."""

    name = "functions"
    looks_for = (
        "torch's scaled_dot_product_attention, multi_head_attention_forward and flex_attention, "
        "and a softmax over a product of batched queries and keys"
    )

    @contextmanager
    def installed(self, capture: AttentionCapture) -> Iterator[None]:
        """A mode on torch's stack for as long as it is entered."""
        mode = capture.mode = FunctionWatch(capture)
        _push_mode(mode)
        try:
            yield
        finally:
            capture.mode = None
            remove(mode)


class FunctionWatch(TorchFunctionMode):
    """Hands every call of a known function to what reads it; changes nothing."""

    def __init__(self, capture: AttentionCapture) -> None:
        super().__init__()
        self.capture = capture
        self.products = Products()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.capture.listening():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "softmax":
            return handle_softmax(self.capture, self.products, func, args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self.capture, func, args, kwargs)
        result = func(*args, **kwargs)
        try:
            self.products.follow(name, args, kwargs, result)
        except Exception as error:
            self.capture.failed(error)
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


def remove(mode: TorchFunctionMode) -> None:
    """Take ``mode`` off torch's stack, and leave what others have put on top of it."""
    above = []
    while (top := _get_current_function_mode()) is not mode:
        if top is None:
            break
        above.append(_pop_mode())
    else:
        _pop_mode()
    for other in reversed(above):
        _push_mode(other)
