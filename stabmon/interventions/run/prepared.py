"""State that an intervention keeps from before the first step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stabmon._storage.stored_value import Stored


class Prepared:
    """State that an intervention keeps from before the first step on."""

    def begin(self) -> None:
        """Start to keep it, before the first step."""

    def on_first_forward(self) -> None:
        """Note that the first forward begins, by which weights and states are loaded."""

    def offer(self, healthy: bool) -> None:
        """Note a sampled step, once its issues are known.

        Args:
            healthy: loss and gradients are finite, and no issue is open that may make it diverge.
        """

    def close(self) -> None:
        """Drop what is kept in memory: the run is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on: plain values, for JSON."""
        return {}

    def parse_state(self, state: Stored) -> Callable[[], None]:
        """Read a state whole, change nothing, and return what restores it.

        Raises:
            ValueError: if it is no state of this.
        """
        return lambda: None
