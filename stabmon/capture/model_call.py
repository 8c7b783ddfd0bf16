"""A call that the model makes, kept apart from what watches it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from stabmon.capture.protocol import CaptureSession, Watcher


class ModelCall:
    """One call of the model, which its watcher makes.

    It records whether the call was made, and whether an error is the model's own.

    Args:
        function: the function.

    Attributes:
        is_made: the call has come to its end.
        result: what it returned.
        has_raised: the call itself raised.
    """

    __slots__ = ("_function", "has_raised", "is_made", "result")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.is_made = self.has_raised = False
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        try:
            self.result = self._function(*args, **kwargs)
        except BaseException:
            self.has_raised = True
            raise
        self.is_made = True
        return self.result


class Watched:
    """A function that the model calls, with a watcher around it.

    Whatever fails in the watcher is reported, and the function called once all the same. This is
    what torch or the model calls, so that nothing of stabmon runs outside its boundary.

    Args:
        session: is told of errors.
        function: the function, called with the model's own arguments.
        watcher: see :data:`~stabmon.capture.protocol.Watcher`.

    Example:
        >>> from types import SimpleNamespace
        >>> def watcher(session, call, args, kwargs):
        ...     raise ValueError("no shape")
        >>> errors = []
        >>> root = Watched(SimpleNamespace(failed=errors.append), abs, watcher)
        >>> root(-2), errors
        (2, [ValueError('no shape')])
    """

    def __init__(
        self, session: CaptureSession, function: Callable[..., Any], watcher: Watcher
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self._session, self._function, self._watcher = session, function, watcher

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call, watched."""
        call = None
        try:
            call = ModelCall(self._function)
            return self._watcher(self._session, call, args, kwargs)
        except Exception as error:
            if call is not None and call.has_raised:
                raise
            self._session.failed(error)
        return result_of(call, self._function, args, kwargs)


def result_of(
    call: ModelCall | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return the result of a call whose watcher has failed, which is made now unless it was.

    Args:
        call: the call; None where the watcher failed before there was one.
        function: what the model calls.
        args: positional arguments.
        kwargs: named arguments.
    """
    return call.result if call is not None and call.is_made else function(*args, **kwargs)
