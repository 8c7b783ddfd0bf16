"""Call held interventions at the moments of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

logger = logging.getLogger("stabmon")

Mark = Literal["attention", "before_optimizer_step", "on_step"]


class StepHooks:
    """Callbacks of held interventions at the moments of a step.

    - ``attention``, with the :class:`~stabmon.records.AttentionCall`: in each training forward,
      once for every attention call.
    - ``before_optimizer_step``: gradients are ready, parameters not yet stepped; once for each
      optimizer that steps.
    - ``on_step``: the optimizer has stepped, the next forward has not begun.

    A callback that raises is logged and removed; the others go on.

    Example:
        >>> hooks, fired = StepHooks(), []
        >>> remove = hooks.add("on_step", lambda: fired.append("step"))
        >>> hooks.fire("on_step")
        >>> remove()
        >>> hooks.fire("on_step")
        >>> fired
        ['step']
    """

    def __init__(self) -> None:
        self._callbacks: dict[Mark, list[list[Callable[..., None]]]] = {
            "attention": [],
            "before_optimizer_step": [],
            "on_step": [],
        }
        """Lists of one callback each: whoever can remove it holds the list, and it is emptied then.

        An effect holds the function that removes its own method, which would keep it alive.
        """

    def add(
        self, mark: Mark, callback: Callable[..., None], *, first: bool = False
    ) -> Callable[[], None]:
        """Call a function at a moment of each step from now on.

        Args:
            mark: the moment.
            callback: the function; it is called without arguments, for ``attention`` with the call.
            first: call it before the others of this moment, else after them.

        Returns:
            A function that removes it, which may be called twice.
        """
        entry, entries = [callback], self._callbacks[mark]
        entries.insert(0 if first else len(entries), entry)

        def remove() -> None:
            self._remove(mark, entry)

        return remove

    def clear(self) -> None:
        """Remove every callback."""
        for mark, entries in self._callbacks.items():
            for entry in list(entries):
                self._remove(mark, entry)

    def wants(self, mark: Mark) -> bool:
        """Return whether a callback waits for a moment; attention is captured only if so."""
        return bool(self._callbacks[mark])

    def fire(self, mark: Mark, *args: Any, contain: bool = True) -> None:
        """Call every callback of a moment, in the order in which they were added.

        Args:
            mark: the moment.
            *args: the arguments of the callbacks.
            contain: log and remove a callback that raises; else let it raise, as where all ranks
                must learn of it.
        """
        for entry in list(self._callbacks[mark]):
            try:
                for callback in list(entry):
                    callback(*args)
            except Exception as error:
                self._remove(mark, entry)
                if not contain:
                    raise
                logger.error(
                    "A held intervention failed at %s and is left out, training goes on: %s",
                    mark,
                    error,
                    exc_info=error,
                )

    def _remove(self, mark: Mark, entry: list[Callable[..., None]]) -> None:
        entry.clear()
        self._callbacks[mark] = [each for each in self._callbacks[mark] if each is not entry]
