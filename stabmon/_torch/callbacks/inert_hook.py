"""Hooks of modules that stay behind when a module is copied or saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class InertHook:
    """A hook that, copied or pickled with its module, does nothing.

    Args:
        callback: called with the hook's arguments; its result is not used.
        on_error: called with what it raises, of which the model sees nothing.

    Example:
        >>> import copy
        >>> seen = []
        >>> hook = InertHook(seen.append, print)
        >>> hook(1), copy.copy(hook)(2, None, None), seen
        (None, None, [1])
    """

    def __init__(
        self, callback: Callable[..., None], on_error: Callable[[Exception], None]
    ) -> None:
        self._callback, self._on_error = callback, on_error

    def __call__(self, *args: Any) -> None:
        """Call the callback."""
        try:
            self._callback(*args)
        except Exception as error:
            self._on_error(error)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
