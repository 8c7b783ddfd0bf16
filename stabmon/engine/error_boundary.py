"""Keep errors of stabmon out of the training loop, and count its overhead."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from stabmon._torch.device_timer import DeviceTimer

logger = logging.getLogger("stabmon")
P = ParamSpec("P")
R = TypeVar("R")


class ErrorBoundary:
    """One monitor's errors and seconds. As a context it counts the time spent inside.

    Example:
        >>> boundary = ErrorBoundary()
        >>> with boundary.timed():
        ...     _ = sum(range(1000))
        >>> boundary.seconds > 0
        True
    """

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()
        """Number of failures by place; the first at each place is logged."""
        self.seconds = 0.0
        """Overhead so far, in seconds of wall time."""
        self._counted, self._since = 0.0, time.perf_counter()
        self._depth, self._started = 0, 0.0

    def failed(self, where: str, error: Exception, traceback: bool = True) -> None:
        """Count an error, and log it if it is the first at its place.

        Args:
            where: the place, such as the name of a method.
            error: the error.
            traceback: log its traceback as well.
        """
        self.errors[where] += 1
        if self.errors[where] == 1:
            logger.error(
                "%s failed and is skipped, training goes on: %s",
                where,
                error,
                exc_info=error if traceback else None,
            )

    def timed(self) -> ErrorBoundary:
        """Return a context whose time counts as overhead, once where it is nested."""
        return self

    def __enter__(self) -> None:
        if not self._depth:
            self._started = time.perf_counter()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._started

    def settle(self, timer: DeviceTimer) -> None:
        """Count the time that a device has spent, instead of the wait for training's own work."""
        if timer.is_used:
            began = time.perf_counter()
            on_device = timer.finish()
            self.seconds += on_device - (time.perf_counter() - began) * (self._depth > 0)

    def overhead_fraction(self) -> float:
        """Return the share of wall time, in [0, 1], that was overhead since the last call."""
        now = time.perf_counter()
        wall, self._since = now - self._since, now
        seconds, self._counted = self.seconds - self._counted, self.seconds
        return min(1.0, seconds / wall) if wall > 0 else 0.0


def contained(method: Callable[P, R]) -> Callable[P, R | None]:
    """Make a method count and log its errors, and return None, instead of raising.

    The method's object needs a ``boundary``, an :class:`ErrorBoundary`. Its time is overhead.
    """
    where = method.__name__.strip("_")

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        this: Any = args[0]
        boundary: ErrorBoundary = this.boundary
        with boundary.timed():
            try:
                return method(*args, **kwargs)
            except Exception as error:
                boundary.failed(where, error)
                return None

    return guarded
