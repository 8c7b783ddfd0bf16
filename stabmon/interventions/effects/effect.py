"""Describe the changes that an intervention made, and how to undo them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Place = tuple[str | None, int | None]
"""(layer, head); a layer of None is the whole run, a head of None the whole layer."""


@dataclass
class Effect:
    """A change that an intervention made to a run, and how to take it back.

    The base class changed nothing.

    Example:
        >>> effect = Effect(places=[("attn", 3)], note="nothing was changed")
        >>> effect.undo(), effect.was_active()
        (True, False)
    """

    places: Sequence[Place] = ((None, None),)
    """The layers and heads that were changed."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """Values before the change, as plain values for the audit record."""
    after: Mapping[str, Any] = field(default_factory=dict)
    """The same values after it."""
    note: str = ""
    """Further facts for the audit record."""
    resources: frozenset[str] = frozenset()
    """Names of changed things; effects with a name in common are undone last in, first out."""
    abandoned_reason: str = ""
    """The reason why it ended by itself and is to be taken back; empty while it has not."""

    def undo(self) -> bool:
        """Take the change back, and stop.

        Returns:
            Whether every bit is as it was; training since may make that impossible.
        """
        self.release()
        return True

    def release(self) -> None:
        """Stop: remove hooks and put attributes back, but keep changes of weights.

        May be called twice.
        """

    def explain_failure(self) -> str:
        """Return the reason to take it back at this sample; empty while there is none."""
        return self.abandoned_reason

    def was_active(self) -> bool:
        """Return whether it had something to do since the last call."""
        return False

    def relax(self) -> Mapping[str, Any]:
        """Loosen it, after it was held and active for long without an alarm.

        Returns:
            The new values, for the record; empty if nothing changed.
        """
        return {}

    def rolled_back(self, step: int) -> Callable[[], None]:
        """Note that the weights are again those from after ``step``.

        Returns:
            A function that takes the note back.
        """
        return lambda: None

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to hold it again: plain values, for JSON."""
        return {}


class HeldEffect(Effect):
    """An effect that is called at moments of each step until it is released."""

    _remove: Sequence[Callable[[], None]] = ()
    """Functions that each remove one callback."""
    _bound: Any = False
    """True if it had something to do since the last :meth:`was_active`.

    A bool, or a scalar tensor that need not come to the host at each step.
    """

    def release(self) -> None:
        for remove in self._remove:
            remove()
        self._remove = ()

    def was_active(self) -> bool:
        bound, self._bound = self._bound, False
        return bool(bound)
