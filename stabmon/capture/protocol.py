"""The session of a capture as adapters see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from stabmon.capture.names import ModuleNames
from stabmon.records import AttentionCall


class CaptureSession(Protocol):
    """An open capture: whose calls are recorded, and where.

    :class:`stabmon.capture.AttentionCapture` is one. Adapters and the coverage check depend on this
    alone, so that they lie below it.

    Attributes:
        model: the model whose attention is captured.
        names: its modules.
        modules: ``fnmatch`` patterns of modules whose softmax is attention in any case.
        at_once: whether a softmax over a product is recorded when it is taken.
        calls: adapter name -> calls recorded.
        unseen: calls of compiled code that were not looked into.
        thread: identity of the thread whose calls are recorded; None while closed.
    """

    model: nn.Module
    names: ModuleNames
    modules: tuple[str, ...]
    at_once: bool
    calls: dict[str, int]
    unseen: int
    thread: int | None

    def is_recording(self) -> bool:
        """Return whether a call made right now is to be recorded."""

    def record(
        self, adapter: str, module: nn.Module, describe: Callable[[str], AttentionCall]
    ) -> None:
        """Count a call of ``module`` and hand its record to the receiver; never raises."""

    def inside(self) -> AbstractContextManager[None]:
        """Record nothing in here: it belongs to a call that has been recorded."""

    def guarded(self) -> AbstractContextManager[None]:
        """Report errors raised in here, and keep them from the model."""

    def failed(self, error: Exception) -> None:
        """Report an error; never raises."""

    def require_functions(self) -> None:
        """Note that only watching torch functions can show some of the model's attention."""

    def pause(self) -> None:
        """Take out everything but the watch over compiled code."""

    def resume(self) -> None:
        """Put back what :meth:`pause` took out."""


Watcher = Callable[[CaptureSession, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Makes one call of the model's, and records it: ``(session, call, args, kwargs) -> result``.

It calls ``call`` once, in place of the function. What else fails in it is kept from the model: see
:class:`~stabmon.capture.model_call.Watched`.
"""


def bind(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name.

    Args:
        names: names of the leading parameters, in order.
        args: positional arguments.
        kwargs: named arguments.
    """
    return dict(zip(names, args, strict=False), **kwargs)
