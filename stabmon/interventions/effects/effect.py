"""Effects: the changes that an intervention made in a run, and how to take them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Place = tuple[str | None, int | None]
"""(layer, head); None for the whole run, and for the whole layer."""


@dataclass
class Effect:
    """What an intervention changed in a run, and how to take it back. The base class changed
    nothing.

    ``before`` and ``after`` hold plain values for the audit record.
    """

    places: Sequence[Place] = ((None, None),)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What a reader of the record should know besides."""
    resources: frozenset[str] = frozenset()
    """Names of what was changed; effects with a name in common are undone last in, first out."""
    given_up: str = ""
    """Why it is at an end by itself, and is to be taken back; empty while it is not."""

    def undo(self) -> bool:
        """Put back what was there before, and stop. Whether every bit is as it was: training since
        may make that impossible.
        """
        self.release()
        return True

    def release(self) -> None:
        """Stop: take out hooks, put back attributes; what has been written into weights stays. May
        be called twice.
        """

    def was_active(self) -> bool:
        """Whether it had something to do since it was last asked: then it is held further."""
        return False

    def relax(self) -> Mapping[str, Any]:
        """It was held for long without an alarm, and at work: hold less tightly. What changed, for
        the record; empty if nothing.
        """
        return {}

    def rolled_back(self, step: int) -> Callable[[], None]:
        """Take note that the weights are again those of after ``step``; returns what takes that
        note back.
        """
        return lambda: None

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`Intervention.resume` needs to go on after a restart: plain values, for
        JSON.
        """
        return {}


class HeldEffect(Effect):
    """An effect that is called at marks of each step until it is released, and is held further
    where it had something to do.
    """

    _remove: Sequence[Callable[[], None]] = ()
    """What takes each callback out."""
    _bound: Any = False
    """Whether it had something to do since it was last asked: a bool, or a tensor of one that need
    not come to the host at each step.
    """

    def release(self) -> None:
        for remove in self._remove:
            remove()
        self._remove = ()

    def was_active(self) -> bool:
        bound, self._bound = self._bound, False
        return bool(bound)
