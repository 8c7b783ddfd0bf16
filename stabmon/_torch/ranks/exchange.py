"""Exchange facts between ranks at agreed moments, and stop together where one cannot go on."""

from __future__ import annotations

import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from stabmon._torch.process_group import default_store, rank, world_size
from stabmon._torch.ranks.share import RankShare
from stabmon._torch.ranks.transport import Transport, longest_wait

logger = logging.getLogger("stabmon")

INLINE = 58
"""Numbers that travel with the header of a meeting, in one collective."""
_exchanges = itertools.count()
State = Literal["together", "alone", "off"]


class RankFailed(Exception):
    """A rank could not go on; raised at the same exchange on all ranks.

    Args:
        words: which rank, and where.
        depth: depth of the joint work that has ended by it, 1 for the outermost; 0 for all.
    """

    def __init__(self, words: str, depth: int = 0) -> None:
        super().__init__(words)
        self.depth = depth


class RankExchange:
    """All exchanges of one monitor with those of the other ranks.

    ``together``
        Ranks exchange at agreed moments: at each sampled step, and where interventions are judged,
        applied or held. A rank on which something fails says so in the next exchange.
    ``alone``
        This rank has left, or lost the others: it reports its own readings, and exchanges nothing
        more. There is no way back.
    ``off``
        The monitor is closed.

    An exchange never raises anything but :class:`RankFailed`, and that on all ranks at once. Where a
    rank does not come, the others wait for
    :func:`~stabmon._torch.ranks.transport.longest_wait`, and are alone from then on; training goes
    on in any case.

    Args:
        on_alone: called once when ranks are together no longer.
    """

    def __init__(self, on_alone: Callable[[], None] = lambda: None) -> None:
        self.state: State = "together" if world_size() > 1 else "alone"
        self.agenda = 0
        """The next step at which all ranks exchange readings."""
        self.due: list[str] = []
        """Exchanges of the step in progress that this rank has not come to yet."""
        self.trouble = ""
        """Failure here since the last exchange of readings, in words; sent with the next."""
        self.is_troubled = False
        """Some rank has failed at interventions; all stop them at the end of the step."""
        self.equal_gradients = False
        """Gradients are known to be the same on all ranks before the optimizer steps."""
        self.are_replicas = False
        """All ranks hold the same weights, and each of them whole."""
        self.share = RankShare()
        """Layers and heads of the whole run that this rank holds, once ranks have compared them."""
        self.holding = False
        """Interventions are held that are called after each step."""
        self.has_met = self.is_opened = False
        """Ranks have compared their steps, and then their models."""
        self.on_alone = on_alone
        self._name = ""
        self._transport: Transport | None = None
        self.depth = 0
        self._met, self.needs_end = 0, True
        """Meetings in the present joint work; whether there is one at its end."""

    @property
    def name(self) -> str:
        """The name under which ranks find each other, another for each exchange of a process.

        Numbered at its first use, so that a monitor that never comes to an exchange takes no number
        on one rank alone.
        """
        self._name = self._name or f"stabmon/{next(_exchanges)}"
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def together(self) -> bool:
        """Return whether this rank exchanges with others."""
        return self.state == "together"

    @property
    def collectives(self) -> int:
        """Number of collectives made so far."""
        return self._made if self._transport is None else self._transport.count

    _made = 0

    def leave(self, why: str) -> None:
        """Go on alone, for good; others notice at their next exchange.

        Args:
            why: the reason, for one line in the log; empty for none.
        """
        if self.state != "together":
            return
        self.state, self.due = "alone", []
        if self._transport is not None:
            self._made = self._transport.count
            self._transport.close()
            self._transport = None
        if why:
            logger.warning(
                "stabmon: ranks are watched one by one from here on, and interventions are off: %s",
                why,
            )
        self.on_alone()

    def close(self) -> None:
        """Exchange nothing more, and drop the connections."""
        self.on_alone = lambda: None
        self.leave("")
        self.state = "off"

    def meet(
        self, moment: str, values: Sequence[float] = (), *, failed: bool = False
    ) -> list[float]:
        """Meet the other ranks, and return the largest of each value over ranks.

        Args:
            moment: the same on all ranks.
            values: as many on all ranks, without NaN.
            failed: this rank cannot go on.

        Raises:
            RankFailed: on all ranks, where one has failed or come to another moment.
        """
        count, tag = len(values), float(zlib.crc32(moment.encode()))
        depth = -float(self.depth) if failed else -float("inf")
        header = [(rank() + 1.0) * failed, depth, tag, -tag, float(count), -float(count)]
        inline = [*values[:INLINE], *[0.0] * (INLINE - len(values[:INLINE]))]
        vector = torch.tensor([*header, *inline], dtype=torch.float64)
        # from here to the end of the collective nothing of this rank's own may fail, and after it
        # nothing is called that may
        found: list[float] = self._reduce(lambda transport: transport.largest(vector)).tolist()
        self._met += 1
        if found[0]:
            raise RankFailed(f"rank {int(found[0]) - 1} failed", int(-found[1]))
        if found[2] != -found[3] or found[4] != -found[5]:
            raise RankFailed(f"ranks have come to other work than {moment!r}")
        if count <= INLINE:
            return found[6 : 6 + count]
        rest = torch.tensor(list(values), dtype=torch.float64)
        longer: list[float] = self._reduce(lambda transport: transport.largest(rest)).tolist()
        return longer

    def of_first(self, value: Any) -> Any:
        """Return rank 0's value on all ranks: plain values for JSON; two collectives if not None.

        Raises:
            RankFailed: see :meth:`meet`.
        """
        text = json.dumps(value).encode() if rank() == 0 and value is not None else b""
        length = int(self.meet("verdict", [float(len(text))])[0])
        if not length:
            return None
        self.needs_end = True
        data = list(map(float, text)) or [0.0] * length
        return json.loads(bytes(map(int, self.meet("words", data))))

    def copy_from(self, tensor: Tensor, source: int) -> None:
        """Set a tensor to that of another rank, which must have the same shape and type there.

        Raises:
            RankFailed: where another rank was lost.
        """
        self._reduce(lambda transport: transport.copy_from(tensor, source))

    def add_and_compare(self, added: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`~stabmon._torch.ranks.transport.Transport.add_and_compare`.

        Raises:
            RankFailed: where another rank was lost.
        """
        found: tuple[Tensor, Tensor] = self._reduce(
            lambda transport: transport.add_and_compare(added, largest)
        )
        return found

    @contextmanager
    def joint(self, moment: str, *, quick: bool = False) -> Iterator[None]:
        """Do work that all ranks begin and end together, with meetings in it.

        Where it raises on one rank, it raises :class:`RankFailed` on the others at their next
        meeting, which is the one at its end at the latest. So it has either been done on all ranks,
        or on none, once each has undone its own part.

        Args:
            moment: the same on all ranks.
            quick: the work has one meeting, and none at its end unless :attr:`needs_end` is set on
                all ranks; what fails after it is told in the next exchange of readings.
        """
        if not self.together:
            yield
            return
        before, self._met, self.needs_end = self.needs_end, 0, not quick
        self.depth += 1
        try:
            yield
            if self.together and (self.needs_end or not self._met):
                self.meet(f"end of {moment}")
        except RankFailed:
            raise
        except Exception as error:
            if self.together and (self.needs_end or not self._met):
                self.say_failed(moment)
            elif not self.trouble:
                self.trouble = f"{moment}: {error}"
            raise
        finally:
            self.depth -= 1
            self.needs_end = before

    def say_failed(self, moment: str) -> None:
        """Come to a meeting only to say that this rank cannot go on."""
        try:
            self.meet(moment, failed=True)
        except RankFailed:
            return

    def _reduce(self, collective: Callable[[Transport], Any]) -> Any:
        if self.state != "together":
            raise RankFailed("this rank is alone")
        try:
            if self._transport is None:
                self._transport = Transport(f"{self.name}/group")
            return collective(self._transport)
        except Exception as error:
            words = " ".join(str(error).split())[:120]
            self.leave(f"another rank did not come, or is gone ({words})")
            raise RankFailed("another rank is gone") from error


def announce(subject: str, value: str) -> list[str]:
    """Return the values that all ranks give to a subject, without a collective.

    For moments at which it is not certain that the others come: nobody waits longer than
    :func:`~stabmon._torch.ranks.transport.longest_wait`.

    Args:
        subject: the same on all ranks, and another each time.
        value: this rank's own.

    Returns:
        By rank; empty where a rank has not given its own in time.
    """
    store = default_store() if world_size() > 1 else None
    if store is None:
        return [value]
    keys = [f"{subject}/{each}" for each in range(world_size())]
    store.set(keys[rank()], value)
    try:
        store.wait(keys, longest_wait())
    except Exception:
        logger.info("stabmon: no word of some rank about %s", subject)
        return []
    return [store.get(key).decode() for key in keys]


def decline(subject: str, value: str) -> None:
    """Give a value to a subject on which others may wait for this rank; wait for nobody.

    Args:
        subject: the same on all ranks.
        value: this rank's own.
    """
    store = default_store() if world_size() > 1 else None
    if store is not None:
        store.set(f"{subject}/{rank()}", value)
