"""Attention of transformers models, seen where they look up their attention function at every
forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stabmon.capture.adapters.transformers_kernels import PARAMETERS, Kernel, Reader, reader
from stabmon.capture.protocol import bind, kernel_dtype

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture


class TransformersInterface:
    """Wraps what ``AttentionInterface.get_interface`` returns, where transformers has been
    imported.

    An attention function that is neither the model's own eager one nor one of the library's is left
    alone: what it does is seen as torch functions.
    """

    name = "transformers"
    looks_for = "transformers' AttentionInterface (eager, sdpa, flex, flash)"

    @contextmanager
    def installed(self, capture: AttentionCapture) -> Iterator[None]:
        """Replaces the class's lookup for as long as it is entered."""

        def look(kernel: Kernel, plain: Kernel, default: Kernel) -> Kernel:
            if not capture.is_recording():
                return kernel
            read = reader(plain, default)
            if read is None:
                capture.declined()
                return kernel
            return watched(kernel, read, capture)

        with wrapped_lookup(look):
            yield


Wrap = Callable[[Kernel, Kernel, Kernel], Kernel]
"""``(what is looked up, the same without our wrappers, the model's eager function) -> what the
model gets``.
"""
WRAPPED = "_stabmon_wraps"
"""Attribute of our wrappers: the kernel that they stand for."""


@contextmanager
def wrapped_lookup(wrap: Wrap) -> Iterator[None]:
    """Hand every attention function that models of transformers look up in here through ``wrap``.

    Replaces ``AttentionInterface.get_interface``, a class attribute that is read at each forward
    (checked in transformers 5.23). Does nothing where transformers has not been imported.
    """
    interface: Any = getattr(
        sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None
    )
    original = getattr(interface, "get_interface", None)
    if original is None:
        yield
        return

    @functools.wraps(original)
    def get_interface(self: Any, implementation: str, default: Kernel) -> Kernel:
        kernel: Kernel = original(self, implementation, default)
        plain = getattr(kernel, WRAPPED, kernel)
        wrapper = wrap(kernel, plain, default)
        if wrapper is not kernel:
            setattr(wrapper, WRAPPED, plain)
        return wrapper

    interface.get_interface = get_interface
    try:
        yield
    finally:
        interface.get_interface = original


def watched(kernel: Kernel, read: Reader, capture: AttentionCapture) -> Kernel:
    """``kernel``, preceded by a look at what it is called with."""

    @functools.wraps(kernel)
    def attention(*args: Any, **kwargs: Any) -> Any:
        given = bind(PARAMETERS, args, kwargs)
        module: Any = given.get("module")
        query: Any = given.get("query")
        owned = isinstance(module, nn.Module) and module in capture.names
        if not owned or not capture.is_recording() or given.get("cache") is not None:
            return kernel(*args, **kwargs)
        if not isinstance(query, Tensor) or query.ndim != 4:
            capture.declined()
            return kernel(*args, **kwargs)
        with capture.guarded():
            dtype = kernel_dtype(query)
            capture.record("transformers", module, lambda layer: read(layer, given, dtype))
        with capture.inside():
            return kernel(*args, **kwargs)

    return attention
