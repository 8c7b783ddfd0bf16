"""Keep each parameter group's own past of a setting, and store it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stabmon._storage.stored_value import Stored


class PastSettings:
    """A setting of each parameter group at its highest, and as it was when it had last not jumped."""

    def __init__(self) -> None:
        self._highest: dict[str, float] = {}
        self._newest: dict[str, float] = {}
        """Value of each group when it had last not jumped."""
        self._steps: dict[str, int] = {}
        self._open: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as plain values."""
        return {
            "highest": dict(self._highest),
            "newest": dict(self._newest),
            "steps": dict(self._steps),
        }

    def parse_state(self, state: Mapping[str, Any] | Stored | None) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it.

        None and a stored None leave everything as it is.

        Raises:
            ValueError: if it is no state of this.
        """
        saved, fresh = Stored.of(state), type(self)()
        if saved.value is None:
            return lambda: None
        fresh._highest, fresh._newest = saved["highest"].numbers(), saved["newest"].numbers()
        fresh._steps = {key: each.integer() for key, each in saved["steps"].items()}
        return lambda: vars(self).update(vars(fresh))
