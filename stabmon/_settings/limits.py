"""Limits of a setting's value, declared in its annotation: ``steps: Annotated[int, Bounds(1)]``."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any


class Limit(ABC):
    """A condition on a value that has the right type already."""

    @abstractmethod
    def allows(self, value: Any) -> bool:
        """Return whether ``value`` is within the limit."""

    @abstractmethod
    def describe(self, kind: str) -> str:
        """Return the words for a value of this ``kind`` within the limit."""


@dataclass(frozen=True)
class Bounds(Limit):
    """An interval of numbers; NaN lies in none.

    Args:
        low: smallest value allowed.
        high: largest value allowed.
        above: values must be larger than this one.
        below: values must be smaller than this one.

    Example:
        >>> Bounds(above=0, high=1).allows(0)
        False
        >>> Bounds(1).describe("a whole number")
        'a whole number of at least 1'
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        return (
            value == value
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def describe(self, kind: str) -> str:
        ends = {
            "of at least": self.low,
            "above": self.above,
            "at most": self.high,
            "below": self.below,
        }
        parts = [f"{words} {end:g}" for words, end in ends.items() if end is not None]
        return f"{kind} {' and '.join(parts)}"


@dataclass(frozen=True)
class NonEmpty(Limit):
    """A list or mapping with at least one entry."""

    def allows(self, value: Any) -> bool:
        return len(value) > 0

    def describe(self, kind: str) -> str:
        return f"{kind}, at least one"


@dataclass(frozen=True, eq=False)
class Known(Limit):
    """A name from a registry or a list.

    Args:
        names: the names allowed; a registry is loaded only when a name is looked up.
        kind: word for one of them in messages, such as ``signal``.
    """

    names: Any
    kind: str

    def allows(self, value: Any) -> bool:
        return value in self.names

    def describe(self, kind: str) -> str:
        return f"the name of a known {self.kind}"


Count = Annotated[int, Bounds(1)]
"""A whole number of at least 1."""
Fraction = Annotated[float, Bounds(0, 1)]
"""A number from 0 to 1."""
Factor = Annotated[float, Bounds(above=0, high=1e6)]
"""A number above 0 that something is multiplied by."""
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(0)]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, then all.

    Example:
        >>> suggest("log_evry", ["log_every", "signals"])
        ", did you mean 'log_every'? Known: log_every, signals"
    """
    names: Collection[str] = [*known]
    near = nearest(name, names)
    hint = f", did you mean {near!r}?" if near else "."
    return f"{hint} Known: {', '.join(names) or 'none'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelled most like ``name``; None where none is near.

    Example:
        >>> nearest("obsreve", ["guard", "observe"])
        'observe'
    """
    return next(iter(difflib.get_close_matches(name, [*known], n=1)), None)
