"""Typed access to stored states, so that a damaged one is refused in time.

Each value is read by its type before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar, cast

import numpy as np

T = TypeVar("T")
_LARGEST = 2**63 - 1
"""Largest whole number; NumPy holds no larger ones."""


class Stored:
    """One value of a stored state and its path in it.

    Each method raises a ``ValueError`` of one line, with the path, for a value of another type.

    Args:
        value: plain values, as JSON or ``torch.load`` gives them.
        name: its name in the value around it, for messages.
        parent: the value around it; None at the root.

    Example:
        >>> Stored({"losses": [[1, "x"]]})["losses"].parts()[0].parts()[1].number()
        Traceback (most recent call last):
        ValueError: losses.0.1 is 'x', not a number
    """

    def __init__(self, value: Any, name: str = "", parent: Stored | None = None) -> None:
        self.value = value
        self._name, self._parent = name, parent
        self.left_out: list[str] = [] if parent is None else parent.left_out
        """Notes on values that were left out, over the whole state."""

    @classmethod
    def of(cls, value: Any) -> Stored:
        """Return ``value`` itself where it is a ``Stored``, else wrap it."""
        return value if isinstance(value, Stored) else cls(value)

    @property
    def where(self) -> str:
        """Names from the root to here, joined by dots."""
        above = "" if self._parent is None else self._parent.where
        return ".".join(name for name in (above, self._name) if name)

    def leave_out(self, why: str) -> None:
        """Note that this value is left out and why, though the rest is taken."""
        self.left_out.append(f"{self.where}: {why}")

    def __getitem__(self, name: str) -> Stored:
        if name not in self:
            raise ValueError(f"{self.where or 'it'} has no {name!r}")
        return Stored(self.value[name], name, self)

    def __contains__(self, name: str) -> bool:
        if type(self.value) is dict and name in self.value:
            return True  # without a look at every key
        return name in self.mapping()

    def get(self, name: str, default: Any) -> Stored:
        """Return one entry, or ``default`` where older states had none."""
        return self[name] if name in self else Stored(default, name, self)

    def mapping(self) -> Mapping[str, Any]:
        """Return a mapping from text to plain values."""
        if not isinstance(self.value, Mapping) or not all(
            isinstance(name, str) for name in self.value
        ):
            raise self._not("a mapping from text")
        return self.value

    def items(self) -> list[tuple[str, Stored]]:
        """Return the (name, value) pairs of a mapping."""
        return [(name, Stored(value, name, self)) for name, value in self.mapping().items()]

    def parts(self, count: int | None = None) -> list[Stored]:
        """Return the entries of a list, of which there must be ``count`` unless None."""
        if not isinstance(self.value, (list, tuple)) or count not in (None, len(self.value)):
            raise self._not("a list" if count is None else f"a list of {count}")
        return [Stored(value, str(at), self) for at, value in enumerate(self.value)]

    def integer(self, least: int | None = 0) -> int:
        """Return a whole number of at least ``least``; of any sign for None."""
        if not isinstance(self.value, Integral) or isinstance(self.value, bool):
            raise self._not("a whole number")
        if least is not None and self.value < least:
            raise self._not(f"a whole number of at least {least}")
        number = int(self.value)
        if abs(number) > _LARGEST:
            raise self._not("a whole number of 64 bits")
        return number

    def number(self) -> float:
        """Return a number, which may be NaN or infinite."""
        if not isinstance(self.value, Real) or isinstance(self.value, bool):
            raise self._not("a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self._not("a number that float64 holds") from None

    def array(self) -> np.ndarray:
        """Return a list of numbers as float64 ``[N]``; None in it is NaN."""
        if not isinstance(self.value, (list, tuple, np.ndarray)):
            raise self._not("a list of numbers")
        if not isinstance(self.value, np.ndarray) and any(
            isinstance(each, (str, bytes, list, dict)) for each in self.value
        ):
            raise self._not("a list of numbers")
        try:
            values = np.array(self.value, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            raise self._not("a list of numbers that float64 holds") from None
        if values.ndim != 1:
            raise self._not("a list of numbers")
        return values

    def numbers(self) -> dict[str, float]:
        """Return a mapping from text to numbers."""
        return {name: each.number() for name, each in self.items()}

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            raise self._not("text")
        return self.value

    def one_of(self, known: tuple[str, ...]) -> str:
        """Return one of these strings."""
        if self.value not in known:
            raise self._not(f"one of {', '.join(known)}")
        return cast(str, self.value)

    def flag(self) -> bool:
        """Return True or False."""
        if not isinstance(self.value, bool):
            raise self._not("true or false")
        return self.value

    def maybe(self, read: Callable[[Stored], T]) -> T | None:
        """Return ``read`` of the value; None for None."""
        return None if self.value is None else read(self)

    def _not(self, expected: str) -> ValueError:
        shown = _short(self.value)
        shown = shown if len(shown) < 60 else f"{shown[:40]}... ({type(self.value).__name__})"
        return ValueError(f"{self.where or 'it'} is {shown}, not {expected}")


def _short(value: Any) -> str:
    """Return the start of a value's ``repr``; its type where it has none."""
    try:
        return repr(value)
    except Exception:  # nested too deep, or a whole number of too many digits
        return type(value).__name__
