"""Pack what ranks exchange at a sampled step: signals, losses, and the next sample."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import is_split
from stabmon._torch.process_group import default_store, rank, world_size
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon._torch.ranks.identity import has_split_heads, weights_digest
from stabmon.records import NonFinite
from stabmon.signals import SIGNALS, HeadSums

logger = logging.getLogger("stabmon")

Sums = Mapping[str, Mapping[str, HeadSums]]
Layout = list[tuple[str, str, int]]
"""Layer, signal and number of heads of each entry of the vector."""
MOST_LOSSES = 256
"""Newest steps whose losses ranks exchange at a sampled step."""
_WAIT = timedelta(seconds=10)
"""Longest wait of rank 0 for the findings of others, once a non-finite episode."""
_CAUSES_FIRST = ("parameter", "input", "activation", "score", "loss", "gradient")
"""Kinds of findings, those that name a cause first.

A bad gradient reaches every rank, its cause is on one.
"""
_RANKS = 1 << 20
"""Ranks that fit into the low bits of a float64 whose other bits hold a float32."""


@dataclass(frozen=True)
class Shared:
    """Knowledge that all ranks share after a sampled step's exchange."""

    sums: dict[str, dict[str, HeadSums]]
    """Signals over all ranks, by layer; this rank's own where ranks hold other layers."""
    squares: dict[str, list[float]] = field(default_factory=dict)
    """Sums over ranks of what they offered; without those that some rank lacked."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, mean loss over ranks) of the newest steps."""
    rank_losses: tuple[tuple[int, float, int], ...] = ()
    """(step, largest loss of a rank, that rank) of the newest steps."""


@dataclass
class Offer:
    """Share of this rank in a sampled step's exchange; the defaults where it has nothing."""

    sums: Sums = field(default_factory=dict)
    squares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Numbers of this rank's shards that are to be added, by name."""
    losses: Sequence[tuple[int, float]] = ()
    ahead: int = 0
    """Steps to the next sample that this rank wishes for; 0 for no wish."""
    least: int = 1
    """Least number of steps to the next sample that its measured time allows."""
    gradient_norm: float = math.nan
    """L2 norm of all gradients, to compare ranks by its bits."""


@dataclass(frozen=True)
class Added:
    """Numbers that are added over ranks."""

    total: Tensor
    count: Tensor


SQUARES = "squares"
"""Name of an entry of the vector that is no signal, but numbers to be added."""
_reducers = itertools.count()


class RankReducer:
    """Means and maxima over ranks, in one exchange of agreed length at each sampled step.

    At the first sampled step the ranks compare their models and what they measure. Where models
    differ, as between pipeline stages, each keeps to its own signals. A rank that has nothing to
    give sends neutral values of the agreed length.

    Args:
        model: where its heads are split over ranks (tensor parallel), each rank keeps to its own.
        exchange: with the other ranks.
        log_every: longest interval between samples in a quiet run.
    """

    def __init__(self, model: nn.Module, exchange: RankExchange, log_every: int) -> None:
        self.exchange = exchange
        self._model, self._log_every = model, log_every
        self._slots = min(log_every, MOST_LOSSES)
        self._layout: Layout = []
        """The entries of the vector; empty where each rank keeps to its own, and at first."""
        self._is_max = torch.zeros(0, dtype=torch.bool)
        self._early_name = f"stabmon/early/{next(_reducers)}"
        self._is_first = True
        """No step has been exchanged since the models were compared."""

    @property
    def active(self) -> bool:
        """Return whether there are other ranks to exchange with."""
        return self.exchange.together

    def reduce(self, step: int, offer: Callable[[], Offer]) -> Shared:
        """Exchange a sampled step, which all ranks do at the same steps.

        To be called again where it has raised before the exchange was made.

        Args:
            step: the step.
            offer: makes what this rank gives; where it raises, this rank gives nothing.

        Raises:
            RankFailed: where ranks are together no longer.
        """
        exchange, own = self.exchange, Offer()
        if not exchange.has_met:
            self._compare_steps(step)
        try:
            own = offer()
        except Exception as error:  # others wait for this rank's vector
            self._report(error)
        if not exchange.is_opened:
            self._open(own)
        try:
            added, largest = self._pack(own, step)
        except Exception as error:  # as above
            self._report(error)
            own, (added, largest) = Offer(), self._neutral(step)
        if exchange.trouble:
            largest[0] = 1.0
        added, largest = exchange.add_and_compare(added, largest)
        # what all ranks conclude alike comes first, and calls nothing that may fail
        if "reading" in exchange.due:
            exchange.due.remove("reading")
        control, exchange.trouble = largest[:CONTROL].tolist(), ""
        exchange.agenda = step + int(max(-control[1], control[2], 1))
        exchange.is_troubled = exchange.is_troubled or control[0] > 0
        if self._is_first and exchange.is_opened:
            self._is_first = False
            exchange.equal_gradients = control[3] == -control[4] and control[3] > 0
        slots = self._slots
        losses = _mean_losses(step, added[: 2 * slots].reshape(2, slots))
        worst = _worst_losses(step, largest[CONTROL : CONTROL + slots])
        sums = {layer: dict(signals) for layer, signals in own.sums.items()}
        squares: dict[str, list[float]] = {}
        if self._layout:
            rest = added[2 * slots :].reshape(2, -1), largest[CONTROL + slots :]
            sums = self._unpack(*rest, sums)
            squares = self._unpack_squares(rest[0])
        return Shared(sums, squares, losses, worst)

    def _compare_steps(self, step: int) -> None:
        """Compare the steps at which ranks stand, and their intervals, before anything else."""
        exchange, every = self.exchange, float(self._log_every)
        found = exchange.meet("first step", [step, -step, every, -every])
        exchange.has_met = True
        if found[0] != -found[1] or found[2] != -found[3]:
            what = "steps" if found[0] != -found[1] else "log_every"
            exchange.leave(
                f"ranks have other {what}; give all ranks the same settings, and the same state "
                "where a run is resumed"
            )
            raise RankFailed(f"ranks have other {what}")

    def _report(self, error: Exception) -> None:
        logger.error("this rank's readings are left out of a sampled step: %s", error)

    def _open(self, own: Offer) -> None:
        """Compare models and agree on what is exchanged; tried again where some rank fails."""
        layout = None
        try:
            with self.exchange.joint("comparison of models"):
                layout = self._common_layout(layout_of(entries_of(own)))
                self._agree_on(layout or [])
            self.exchange.is_opened = layout is not None
        except Exception as error:
            self._layout, self._is_max = [], self._is_max[:0]
            if not self.exchange.together:
                raise
            if not isinstance(error, RankFailed):
                self._report(error)

    def _common_layout(self, entries: Layout) -> Layout | None:
        """Return what is exchanged: nothing where models differ; None where it is too early."""
        exchange = self.exchange
        digest, identity = float(_digest(repr(entries))), float(weights_digest(self._model))
        split, sharded = has_split_heads(self._model), is_split(self._model)
        given = [digest, -digest, identity, -identity, float(split), float(sharded)]
        found = exchange.meet("models", [-float(len(entries)), *given])
        if found[0] >= 0:
            return None  # some rank has measured nothing yet
        is_same = found[3] == -found[4]
        exchange.are_replicas = is_same and not found[6]
        if not is_same:
            logger.warning(
                "Ranks hold different attention layers: each reports its own, and rank 0's are "
                "recorded."
            )
        if not is_same:
            return []
        common = entries
        if found[1] != -found[2]:  # the same model, of which some rank measures less
            common = [
                (str(layer), str(name), int(heads))
                for layer, name, heads in exchange.of_first(entries) or []
            ]
        has_other_heads = bool(found[5])
        return [each for each in common if each[1] == SQUARES] if has_other_heads else common

    def _agree_on(self, layout: Layout) -> None:
        self._layout = layout
        self._is_max = torch.tensor(
            [
                name != SQUARES and SIGNALS[name].reduction == "max"
                for _, name, heads in layout
                for _ in range(heads)
            ],
            dtype=torch.bool,
        )

    def share(self, found: NonFinite | None, step: int) -> NonFinite | None:
        """Return on rank 0 the finding nearest to a cause, on others their own.

        No collective: rank 0 reads what the others left in the store.

        Args:
            found: this rank's finding.
            step: the optimizer step that it is of.

        Returns:
            The finding, with the rank that made it in ``detail``.
        """
        store = default_store() if world_size() > 1 else None
        if store is None:
            return found
        # before ranks have met, one that finds nothing does not come here, and takes no name
        name = self.exchange.name if self.exchange.has_met else self._early_name
        keys = [f"{name}/{step}/{each}" for each in range(world_size())]
        store.set(keys[rank()], json.dumps(None if found is None else found.to_dict()))
        if rank() != 0:
            return found
        try:
            store.wait(keys, _WAIT)
        # some rank found nothing, or found it too late: only its finding is missing
        except Exception as error:
            logger.info("no finding of some rank for step %s: %s", step, error)
        shared = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
        findings = [
            NonFinite.from_dict(each, detail=f"{each['detail']} (rank {number})")
            for number, each in enumerate(shared)
            if each
        ]
        return min(
            findings,
            key=lambda each: (_CAUSES_FIRST.index(each.kind), each.layer is None),
            default=found,
        )

    def _neutral(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the two vectors of a rank that has nothing to give."""
        heads = len(self._is_max)
        added = torch.zeros(2 * self._slots + 2 * heads, dtype=torch.float64)
        largest = torch.full((CONTROL + self._slots + heads,), -torch.inf, dtype=torch.float64)
        largest[:CONTROL] = torch.tensor(
            [0.0, -float(self._log_every), 1.0, -torch.inf, torch.inf], dtype=torch.float64
        )
        return added, largest

    def _pack(self, own: Offer, step: int) -> tuple[Tensor, Tensor]:
        """Return what is added and what is compared: control, losses, signals."""
        added, largest = self._neutral(step)
        slots, norm = self._slots, own.gradient_norm
        largest[1] = -float(own.ahead or self._log_every)
        largest[2] = float(own.least)
        if math.isfinite(norm):
            largest[3], largest[4] = norm, -norm
        for at, loss in own.losses:
            slot = at - (step - slots + 1)
            if 0 <= slot < slots:
                added[slot], added[slots + slot] = loss, 1.0
                largest[CONTROL + slot] = _with_rank(loss, rank())
        if self._layout:
            sums, maxima = self._pack_signals(entries_of(own))
            added[2 * slots :], largest[CONTROL + slots :] = sums.reshape(-1), maxima
        return added, largest

    def _pack_signals(self, own: Mapping[str, Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return the ``[2, N]`` values to add and the ``[N]`` values to maximise.

        N is the number of heads of all layers and signals. Added are totals (for a maximum: 1 where
        it is NaN) and counts. An entry that this rank lacks, or has with other heads, is neutral.
        """
        entries = self._layout
        heads = sum(count for *_, count in entries)
        totals, counts = torch.zeros(2, heads, dtype=torch.float64)
        known, at = [], 0
        for layer, name, count in entries:
            each = own.get(layer, {}).get(name)
            if each is not None and len(each.total) == count:
                known.append((each, slice(at, at + count)))
            at += count
        if known:
            try:
                device = known[0][0].total.device
                both = torch.stack(
                    [
                        torch.cat([each.total.double().to(device) for each, _ in known]),
                        torch.cat([each.count.double().to(device) for each, _ in known]),
                    ]
                ).cpu()
                where = torch.cat([torch.arange(at.start, at.stop) for _, at in known])
                totals[where], counts[where] = both[0], both[1]
            except Exception as error:  # others wait for this rank's vector
                logger.error("this rank's readings are left out of a sampled step: %s", error)
                totals, counts = torch.zeros(2, heads, dtype=torch.float64)
        added = torch.stack([torch.where(self._is_max, totals.isnan().double(), totals), counts])
        seen = self._is_max & ~totals.isnan() & (counts > 0)
        return added, torch.where(seen, totals, -torch.inf)

    def _unpack(
        self, added: Tensor, largest: Tensor, own: dict[str, dict[str, HeadSums]]
    ) -> dict[str, dict[str, HeadSums]]:
        """Return the signals of all ranks; in a rank that measured nothing, none."""
        totals = torch.where(self._is_max, torch.where(added[0] > 0, torch.nan, largest), added[0])
        at = 0
        for layer, name, heads in self._layout:
            where = slice(at, at + heads)
            at += heads
            if own and name != SQUARES:
                own.setdefault(layer, {})[name] = HeadSums(
                    SIGNALS[name], totals[where], added[1, where]
                )
        return own

    def _unpack_squares(self, added: Tensor) -> dict[str, list[float]]:
        """Return the sums of numbers to be added that all ranks gave."""
        at, found = 0, {}
        for key, name, count in self._layout:
            where = slice(at, at + count)
            at += count
            if name == SQUARES and bool((added[1, where] == world_size()).all()):
                found[key] = added[0, where].tolist()
        return found


CONTROL = 5
"""Numbers before the losses in the vector that is compared.

Trouble, minus the steps to the next sample that is wished for, its least interval, the gradients'
norm and its negative.
"""


def entries_of(own: Offer) -> dict[str, dict[str, Any]]:
    """Return what a rank gives to the vector, by layer or key and by name."""
    found: dict[str, dict[str, Any]] = {layer: dict(each) for layer, each in own.sums.items()}
    for key, numbers in own.squares.items():
        total = torch.tensor(list(numbers), dtype=torch.float64)
        found[key] = {SQUARES: Added(total, torch.ones_like(total))}
    return found


def layout_of(own: Mapping[str, Mapping[str, Any]]) -> Layout:
    """Return the entries of what a rank has measured."""
    return [
        (layer, name, len(each.total))
        for layer, signals in own.items()
        for name, each in signals.items()
    ]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _with_rank(loss: float, number: int) -> float:
    """Return a loss as float32 with a rank in the low bits, which the largest keeps."""
    if math.isnan(loss):
        loss = math.inf
    limit = torch.finfo(torch.float32).max
    short = torch.tensor([min(max(loss, -limit), limit)], dtype=torch.float32).double()
    return float((short.view(torch.int64) | (number % _RANKS)).view(torch.float64))


def _without_rank(value: float) -> tuple[float, int]:
    bits = torch.tensor([value], dtype=torch.float64).view(torch.int64)
    number = int(bits) % _RANKS
    loss = float((bits - number).view(torch.float64))
    return (math.inf if loss >= torch.finfo(torch.float32).max else loss), number


def _mean_losses(step: int, added: Tensor) -> tuple[tuple[int, float], ...]:
    """Return (step, mean loss) of the steps of which some rank knows a loss."""
    first = step - added.shape[1] + 1
    pairs = enumerate(zip(*added.tolist(), strict=True), start=first)
    return tuple((at, total / count) for at, (total, count) in pairs if count)


def _worst_losses(step: int, largest: Tensor) -> tuple[tuple[int, float, int], ...]:
    """Return (step, largest loss, its rank) of the same steps."""
    first = step - len(largest) + 1
    known = [(at, value) for at, value in enumerate(largest.tolist(), first) if value > -math.inf]
    return tuple((at, *_without_rank(value)) for at, value in known)
