"""Read stored states: each value by its type, so that a state is known to be whole before anything
is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar, cast, get_args

from stabmon.records import SEVERITIES, IssueState, NonFinite, Overshoot, StabilityIssue

T = TypeVar("T")


class Stored:
    """One value of a stored state and its place in it. What is not as it must be raises a
    ``ValueError`` of one line.

    Args:
        value: plain values, as JSON or ``torch.load`` gives them.
        where: its place, for messages.

    >>> Stored({"losses": [[1, "x"]]})["losses"].parts()[0].parts()[1].number()
    Traceback (most recent call last):
    ValueError: losses.0.1 is 'x', not a number
    """

    def __init__(self, value: Any, where: str = "", parent: Stored | None = None) -> None:
        self.value = value
        self._name, self._parent = where, parent
        self.left_out: list[str] = [] if parent is None else parent.left_out
        """What was left out on the way, all over the state, in words."""

    @classmethod
    def of(cls, value: Any) -> Stored:
        """``value`` itself where it is one."""
        return value if isinstance(value, Stored) else cls(value)

    @property
    def where(self) -> str:
        """Names from the root to here, joined by dots."""
        above = "" if self._parent is None else self._parent.where
        return ".".join(name for name in (above, self._name) if name)

    def leave_out(self, why: str) -> None:
        """Note that this value is not taken, though the rest is."""
        self.left_out.append(f"{self.where}: {why}")

    def __getitem__(self, name: str) -> Stored:
        if name not in self:
            raise ValueError(f"{self.where or 'it'} has no {name!r}")
        return Stored(self.value[name], name, self)

    def __contains__(self, name: str) -> bool:
        return name in self.mapping()

    def get(self, name: str, default: Any) -> Stored:
        """One entry; ``default`` where states of before had none."""
        return self[name] if name in self else Stored(default, name, self)

    def mapping(self) -> Mapping[str, Any]:
        """A mapping from text to plain values."""
        if not isinstance(self.value, Mapping) or not all(
            isinstance(name, str) for name in self.value
        ):
            raise self._not("a mapping from text")
        return self.value

    def items(self) -> list[tuple[str, Stored]]:
        """(name, value) of a mapping."""
        return [(name, Stored(value, name, self)) for name, value in self.mapping().items()]

    def parts(self, count: int | None = None) -> list[Stored]:
        """The entries of a list, of which there must be ``count``."""
        if not isinstance(self.value, (list, tuple)) or count not in (None, len(self.value)):
            raise self._not("a list" if count is None else f"a list of {count}")
        return [Stored(value, str(at), self) for at, value in enumerate(self.value)]

    def integer(self, least: int | None = 0) -> int:
        """A whole number of at least ``least``; of any sign for None."""
        if not isinstance(self.value, Integral) or isinstance(self.value, bool):
            raise self._not("a whole number")
        if least is not None and self.value < least:
            raise self._not(f"a whole number of at least {least}")
        return int(self.value)

    def number(self) -> float:
        """A number; NaN and infinities are some."""
        if not isinstance(self.value, Real) or isinstance(self.value, bool):
            raise self._not("a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self._not("a number that float64 holds") from None

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self._not("text")
        return self.value

    def one_of(self, known: tuple[str, ...]) -> str:
        """One of these strings."""
        if self.value not in known:
            raise self._not(f"one of {', '.join(known)}")
        return cast(str, self.value)

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self._not("true or false")
        return self.value

    def maybe(self, read: Callable[[Stored], T]) -> T | None:
        """What ``read`` makes of it; None for None."""
        return None if self.value is None else read(self)

    def _not(self, what: str) -> ValueError:
        shown = repr(self.value)
        shown = shown if len(shown) < 60 else f"{shown[:40]}... ({type(self.value).__name__})"
        return ValueError(f"{self.where or 'it'} is {shown}, not {what}")


def stored_issue(saved: Stored) -> StabilityIssue:
    """The issue that :meth:`StabilityIssue.to_dict` wrote; entries that are no field are
    ignored.
    """
    return StabilityIssue(
        step=saved["step"].integer(),
        layer=saved["layer"].maybe(Stored.text),
        head=saved["head"].maybe(Stored.integer),
        issue_type=saved["issue_type"].text(),
        severity=saved["severity"].one_of(SEVERITIES),  # type: ignore[arg-type]
        value=saved["value"].number(),
        threshold=saved["threshold"].number(),
        suggestion=saved["suggestion"].text(),
        evidence=dict(saved.get("evidence", {}).mapping()),
        eta_steps=saved.get("eta_steps", None).maybe(Stored.number),
        state=saved.get("state", "opened").one_of(get_args(IssueState)),  # type: ignore[arg-type]
    )


def stored_non_finite(saved: Stored) -> NonFinite:
    """Where a NaN or inf first came up, as ``asdict`` wrote it; entries that are no field are
    ignored.
    """
    known = {field.name for field in fields(NonFinite)}
    values = {name: value for name, value in saved.mapping().items() if name in known}
    for name in ("kind", "tensor"):
        saved[name].text()
    saved["step"].integer()
    saved["layer"].maybe(Stored.text)
    saved["head"].maybe(Stored.integer)
    saved.get("detail", "").text()
    return NonFinite(**values)


def stored_overshoot(saved: Stored) -> Overshoot:
    """What showed that steps are too long, as ``asdict`` wrote it; entries that are no field are
    ignored.
    """
    return Overshoot(
        step=saved["step"].integer(),
        how=saved["how"].one_of(("first_step", "brisk", "steps", "torn", "leap")),  # type: ignore[arg-type]
        gain_ratio=saved["gain_ratio"].number(),
        rise=saved["rise"].number(),
        rates=stored_numbers(saved["rates"]),
        fitting=stored_numbers(saved["fitting"]),
    )


def stored_numbers(saved: Stored) -> dict[str, float]:
    """A mapping from text to numbers."""
    return {name: each.number() for name, each in saved.items()}
