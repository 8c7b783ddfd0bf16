"""Make a call that may hang, in a thread of its own, and wait for it a bounded time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
PATIENCE = 10.0
"""Seconds for which training waits for such a call, once."""


class SlowStart(Generic[T]):
    """A call that is made once, of which the value is asked for as often as need be.

    Args:
        name: the call, for messages.
        make: the call; it is made in a daemon thread.
        patience: seconds that the first :meth:`result` waits; later ones do not wait.

    Example:
        >>> start = SlowStart("answer()", lambda: 42)
        >>> start.result()
        42
    """

    def __init__(self, name: str, make: Callable[[], T], patience: float = PATIENCE) -> None:
        self._name, self._make, self._left = name, make, patience
        self._patience = patience
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._on_late: Callable[[T], Any] | None = None

    def result(self) -> T:
        """Return the value of the call.

        Raises:
            TimeoutError: while it has not returned; ask again later.
            Exception: what it raised; the next :meth:`result` makes it again.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"stabmon {self._name}", daemon=True
                )
                self._thread.start()
            left, self._left = self._left, 0.0
            self._lock.wait_for(lambda: bool(self._found) or self._error is not None, left)
            if self._found:
                return self._found[0]
            if self._error is not None:
                error, self._error, self._thread = self._error, None, None
                self._left = self._patience
                raise error
        raise TimeoutError(
            f"{self._name} has not returned within {self._patience:g} s; its records wait"
        )

    def abandon(self, on_late: Callable[[T], Any]) -> None:
        """Ask no more, and call a function with the value that nobody has asked for.

        Args:
            on_late: called now, or in the thread of the call once there is a value.
        """
        with self._lock:
            self._on_late, found = on_late, list(self._found)
        if found:
            on_late(found[0])

    def _run(self) -> None:
        found: list[T] = []
        error: BaseException | None = None
        try:
            found.append(self._make())
        except BaseException as raised:  # an exit from within somebody's package as well
            error = raised
        with self._lock:
            self._found, self._error = found, error
            self._lock.notify_all()
            late = self._on_late
        if late is not None and found:
            late(found[0])
