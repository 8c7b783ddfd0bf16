"""Hand a method on without keeping its object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a bound method while its object lives.

    A part that is given a method of its owner would make a circle with it. Circles are freed by
    the garbage collector alone, at a time of its own, and a closed monitor would keep the model,
    the optimizer's state and a copy of both until then.

    Args:
        method: a bound method.

    Returns:
        A function with the method's arguments and result; it returns None once the object is gone.

    Example:
        >>> class Counter:
        ...     count = 0
        ...     def add(self, by: int) -> int:
        ...         self.count += by
        ...         return self.count
        >>> counter = Counter()
        >>> add = weakly(counter.add)
        >>> add(2)
        2
        >>> del counter
        >>> add(2) is None
        True
    """
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = held()
        return None if alive is None else alive(*args)

    return call
