"""Call a function that ends something, and once more if it fails."""

from __future__ import annotations

from collections.abc import Callable


def finish(end: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
    """Call a function that removes or closes; if it raises, call it once more.

    The second call removes what the first has left.

    Args:
        end: may be called twice.
        on_error: called with each error.

    Example:
        >>> hooks = ["first", "second"]
        >>> def end():
        ...     while hooks:
        ...         if hooks.pop() == "second":
        ...             raise RuntimeError("no such hook")
        >>> finish(end, print)
        no such hook
        >>> hooks
        []
    """
    for _ in range(2):
        try:
            end()
            return
        except Exception as error:
            on_error(error)
