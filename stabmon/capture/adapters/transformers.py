"""Attention of transformers models, seen in their attention interface.

They look their attention function up at every forward, by ``AttentionInterface.get_interface``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stabmon.capture.adapters.transformers_kernels import PARAMETERS, Kernel, Reader, reader
from stabmon.capture.function_mode import kernel_dtype
from stabmon.capture.model_call import Watched
from stabmon.capture.protocol import CaptureSession, bind


class TransformersInterface:
    """Adapter that wraps what ``AttentionInterface.get_interface`` returns.

    An attention function that is neither the model's own eager one nor one of the library's is left
    alone: it is seen as torch functions. Nothing is done where transformers has not been imported.
    """

    name = "transformers"
    looks_for = "transformers' AttentionInterface (eager, sdpa, flex, flash)"

    @contextmanager
    def installed(self, session: CaptureSession) -> Iterator[None]:
        """Replace the class's lookup in here."""

        def wrap(kernel: Kernel, plain: Kernel, default: Kernel) -> Kernel:
            if not session.is_recording():
                return kernel
            read = reader(plain, default)
            if read is None:
                session.require_functions()
                return kernel
            return Watched(session, kernel, functools.partial(watch_attention, read))

        with wrapped_lookup(wrap, session.failed):
            yield


Wrap = Callable[[Kernel, Kernel, Kernel], Kernel]
"""``(function looked up, the same without our wrappers, the model's eager function) -> function for
the model``.
"""
WRAPPED = "_stabmon_wraps"
"""Attribute of our wrappers: the kernel that they stand for."""


@contextmanager
def wrapped_lookup(
    wrap: Wrap, on_error: Callable[[Exception], None] | None = None
) -> Iterator[None]:
    """Pass every attention function looked up in transformers through ``wrap``.

    Replaces ``AttentionInterface.get_interface``, a class attribute that is read at each forward
    (checked with transformers 5.23). Does nothing where transformers has not been imported.

    Args:
        wrap: see :data:`Wrap`; runs at every lookup, which is once per module and forward.
        on_error: called with what fails in ``wrap``, instead of the model; None to raise it.
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
        try:
            plain = getattr(kernel, WRAPPED, kernel)
            wrapper = wrap(kernel, plain, default)
            if wrapper is not kernel:
                setattr(wrapper, WRAPPED, plain)
            return wrapper
        except Exception as error:
            if on_error is None:
                raise
            on_error(error)
            return kernel

    interface.get_interface = get_interface
    try:
        yield
    finally:
        interface.get_interface = original


def watch_attention(
    read: Reader,
    session: CaptureSession,
    call: Kernel,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Record the arguments of an attention function by a reader, then call it."""
    given = bind(PARAMETERS, args, kwargs)
    module: Any = given.get("module")
    query: Any = given.get("query")
    owned = isinstance(module, nn.Module) and module in session.names
    if not owned or not session.is_recording() or given.get("cache") is not None:
        return call(*args, **kwargs)
    if not isinstance(query, Tensor) or query.ndim != 4:
        session.require_functions()
        return call(*args, **kwargs)
    with session.guarded():
        dtype = kernel_dtype(query)
        session.record("transformers", module, lambda layer: read(layer, given, dtype))
    with session.inside():
        return call(*args, **kwargs)
