"""Gaps: records that a sink was not given or could not write, by kind and steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from stabmon._storage.plain_record import PlainRecord
from stabmon.records import counted


@dataclass(frozen=True)
class Gap(PlainRecord):
    """A hole in the records of one sink.

    Example:
        >>> Gap("readings", 40, 95, 12, "too slow").text()
        '12 readings of steps 40 to 95'
    """

    kind: str
    """``readings``, ``issues``, ``incidents``, ``interventions`` or ``metadata``."""
    first_step: int
    """First optimizer step of which records are missing."""
    last_step: int
    """Last one."""
    count: int
    """Number of records that are missing."""
    reason: str = ""
    """The last error before it, or that the sink was too slow."""

    def text(self) -> str:
        """Return number, kind and steps in words."""
        many = self.kind.endswith("s")
        what = counted(self.count, self.kind.removesuffix("s")) if many else self.kind
        if self.first_step == self.last_step:
            return f"{what} of step {self.last_step}"
        return f"{what} of steps {self.first_step} to {self.last_step}"


class GapBook:
    """The gaps of one sink: those still to be written to it, and all so far.

    Example:
        >>> book = GapBook()
        >>> book.add("readings", (10, 10), 1, "OSError: disk full")
        >>> book.add("readings", (20, 20), 1, "OSError: disk full")
        >>> [gap.text() for gap in book.take()], book.take(), book.lost
        (['2 readings of steps 10 to 20'], [], 2)
    """

    def __init__(self) -> None:
        self._new: dict[str, Gap] = {}
        self._all: dict[str, Gap] = {}

    @property
    def lost(self) -> int:
        """Number of records lost so far."""
        return sum(gap.count for gap in self._all.values())

    def add(self, kind: str, steps: tuple[int, int], count: int, reason: str) -> None:
        """Add records that are lost.

        Args:
            kind: their kind, see :class:`Gap`.
            steps: first and last optimizer step that they are of.
            count: their number.
            reason: why they are lost.
        """
        gap = Gap(kind, *steps, count, reason)
        for book in (self._new, self._all):
            book[kind] = _joined([book[kind], gap]) if kind in book else gap

    def take(self) -> list[Gap]:
        """Return the gaps since the last call, one a kind; they count as marked then."""
        taken, self._new = list(self._new.values()), {}
        return taken

    def give_back(self, gaps: Iterable[Gap]) -> None:
        """Return gaps that could not be marked, to :meth:`take` them again."""
        for gap in gaps:
            new = self._new.get(gap.kind)
            self._new[gap.kind] = gap if new is None else _joined([gap, new])

    def text(self) -> str:
        """Return all that is lost in words; empty for nothing."""
        if not self.lost:
            return ""
        are = "record is" if self.lost == 1 else "records are"
        return f"{self.lost} {are} lost: {in_words(list(self._all.values()))}."


def in_words(gaps: Sequence[Gap]) -> str:
    """Return gaps in words, joined by commas."""
    return ", ".join(gap.text() for gap in gaps)


def _joined(gaps: Sequence[Gap]) -> Gap:
    """Return gaps of one kind as one."""
    return replace(
        gaps[-1],
        first_step=min(gap.first_step for gap in gaps),
        last_step=max(gap.last_step for gap in gaps),
        count=sum(gap.count for gap in gaps),
    )
