"""Pack what ranks exchange at a sampled step: signals, losses, and the next sample."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import is_split
from stabmon._torch.process_group import default_store, rank, world_size
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon._torch.ranks.identity import (
    gathered_dims,
    has_split_heads,
    head_shard,
    mesh_ranks,
    weights_digest,
)
from stabmon._torch.ranks.share import RankShare
from stabmon.engine.ranks.merge import Agreement, Held, Layout, common_key, merge
from stabmon.records import LayerInfo, NonFinite
from stabmon.signals import SIGNALS, HeadSums

logger = logging.getLogger("stabmon")

Sums = Mapping[str, Mapping[str, HeadSums]]
GRADIENT, QUERY_KEY = "gradient of ", "query_key of "
"""Names under which ranks add the squares of a layer's norms."""
MOST_LOSSES = 256
"""Newest steps whose losses ranks exchange at a sampled step."""
_WAIT = timedelta(seconds=10)
"""Longest wait of rank 0 for the findings of others, once a non-finite episode."""
_CAUSES_FIRST = ("parameter", "input", "activation", "score", "loss", "gradient")
"""Kinds of findings, those that name a cause first.

A bad gradient reaches every rank, its cause is on one.
"""
_PATIENCE = 3
"""Samples for which ranks wait for one that has measured nothing, before it counts as without."""
_RANKS = 1 << 20
"""Ranks that fit into the low bits of a float64 whose other bits hold a float32."""


@dataclass(frozen=True)
class Shared:
    """Knowledge that all ranks share after a sampled step's exchange."""

    sums: dict[str, dict[str, HeadSums]]
    """Signals over all ranks, by the layers' common names, of all heads."""
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
    whole: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The same numbers of tensors that this rank holds whole; added where ranks are stages."""
    losses: Sequence[tuple[int, float]] = ()
    ahead: int = 0
    """Steps to the next sample that this rank wishes for; 0 for no wish."""
    least: int = 1
    """Least number of steps to the next sample that its measured time allows."""
    gradient_norm: float = math.nan
    """L2 norm of all gradients, to compare ranks by its bits."""
    info: Mapping[str, LayerInfo] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Facts about the layers of ``sums``, and their modules."""


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
    differ, as between pipeline stages, or heads are split over ranks, as under tensor parallel, they
    agree on names for all layers and on numbers for all heads (:class:`RankShare`), and each gives
    its own. A rank that has nothing to give sends neutral values of the agreed length.

    Args:
        model: the model of this rank.
        exchange: with the other ranks.
        log_every: longest interval between samples in a quiet run.
        stage: the pipeline stage that this rank is, from 0; None to find out.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: RankExchange,
        log_every: int,
        stage: int | None = None,
    ) -> None:
        self.exchange, self._stage = exchange, stage
        self.facts: dict[str, LayerInfo] = {}
        """Facts about all layers, of all heads, where ranks hold different ones."""
        self._givers: dict[str, int] = {}
        """Number of ranks that give each key of numbers to be added; all where it is missing."""
        self._scale, self._attempts = 1.0, 0
        self._model, self._log_every = model, log_every
        self._slots = min(log_every, MOST_LOSSES)
        self._layout: Layout = []
        """The entries of the vector; empty at first."""
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
        share = exchange.share
        sums = {
            share.common(layer): {
                name: _placed(each, layer, share) for name, each in signals.items()
            }
            for layer, signals in own.sums.items()
        }
        squares: dict[str, list[float]] = {}
        if self._layout:
            rest = added[2 * slots :].reshape(2, -1), largest[CONTROL + slots :]
            sums = self._unpack(*rest, sums if share.is_whole else {}, has_measured=bool(own.sums))
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
                layout = self._common_layout(own)
                self._agree_on(layout or [])
            self.exchange.is_opened = layout is not None
        except Exception as error:
            self._layout, self._is_max = [], self._is_max[:0]
            if not self.exchange.together:
                raise
            if not isinstance(error, RankFailed):
                self._report(error)

    def _common_layout(self, own: Offer) -> Layout | None:
        """Return what is exchanged; None where it is too early to know."""
        exchange, entries = self.exchange, layout_of(entries_of(own))
        self._attempts += 1
        mesh = mesh_ranks(self._model)
        apart = has_split_heads(self._model) or 1 < len(mesh) < world_size()
        apart = apart or self._stage is not None
        digest, identity = float(_digest(repr(entries))), float(weights_digest(self._model))
        given = [digest, -digest, identity, -identity, float(apart), float(is_split(self._model))]
        is_early = not entries and self._attempts <= _PATIENCE
        found = exchange.meet("models", [float(is_early), *given])
        if found[0]:
            return None  # some rank has measured nothing yet
        is_same = found[3] == -found[4]
        exchange.are_replicas = is_same and not found[5] and not found[6]
        if not is_same or found[5]:
            return self._merged_layout(own, identity, mesh)
        exchange.share = RankShare()
        if found[1] != -found[2]:  # the same model, of which some rank measures less
            return [
                (str(layer), str(name), int(heads))
                for layer, name, heads in exchange.of_first(entries) or []
            ]
        return entries

    def _merged_layout(self, own: Offer, identity: float, mesh: list[int]) -> Layout:
        """Agree on common names for the layers and heads of all ranks, and return their entries.

        Rank 0 reads from the store what each rank holds, and sends what all of them hold together.

        Raises:
            RuntimeError: if there is no store, or some rank's description is missing there.
        """
        exchange, store = self.exchange, default_store()
        if store is None:
            raise RuntimeError("the process group has no store to describe models in")
        held, shards = self._held(own, identity, mesh)
        text = json.dumps(held.to_list())
        # replicas have the same text: rank 0 reads it once
        name, digest = f"{exchange.name}/model", str(_digest(text))
        store.set(f"{name}/{digest}", text)
        store.set(f"{name} of {rank()}", digest)
        exchange.meet("described")
        plain = None
        if rank() == 0:
            digests = [store.get(f"{name} of {each}").decode() for each in range(world_size())]
            texts = {each: json.loads(store.get(f"{name}/{each}")) for each in set(digests)}
            plain = asdict(merge([Held.of(texts[each]) for each in digests]))
        agreed = Agreement(**(exchange.of_first(plain) or {}))
        exchange.share = agreed.share_of(rank(), shards)
        self.facts = agreed.facts()
        self._givers = {key: givers for key, (_, givers) in agreed.added.items()}
        if agreed.is_staged:
            exchange.are_replicas = False
            stage = agreed.stage_of[rank()]
            self._scale = world_size() / list(agreed.stage_of).count(stage)
        if rank() == 0 and (words := agreed.words()):
            logger.warning("%s", words)
        added = [(key, SQUARES, count) for key, (count, _) in agreed.added.items()]
        signals = [(str(layer), str(name), int(heads)) for layer, name, heads in agreed.entries]
        return [each for each in signals if each[1] in SIGNALS] + added

    def _held(self, own: Offer, identity: float, mesh: list[int]) -> tuple[Held, dict[str, int]]:
        """Describe what this rank holds; also which shard of its heads, by layer."""
        gathered, layers, shards = gathered_dims(self._model), {}, {}
        for layer, signals in own.sums.items():
            if not signals or layer not in own.info:
                continue
            info, heads = own.info[layer], len(next(iter(signals.values())).total)
            module, shard = own.modules.get(layer), 0
            if module is not None:
                shard = head_shard(module, heads, info.head_dim, gathered)
            shards[layer] = shard
            layers[layer] = (shard, heads, list(signals), info.to_dict())
        numbers = {**own.whole, **own.squares}
        kinds = {key: GRADIENT if key.startswith(GRADIENT) else QUERY_KEY for key in numbers}
        sums = {key: (kinds[key], len(each)) for key, each in numbers.items()}
        values = weights_digest(self._model, parts=True)
        return Held(int(identity), values, mesh, self._stage, layers, sums), shards

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
        if found is not None and found.layer is not None:
            share, head = self.exchange.share, found.head
            head = None if head is None else head + share.span(found.layer, 0)[0]
            found = replace(found, layer=share.common(found.layer), head=head)
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
            sums, maxima = self._pack_signals(entries_of(own, self.exchange.share, self._scale))
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
        self,
        added: Tensor,
        largest: Tensor,
        own: dict[str, dict[str, HeadSums]],
        *,
        has_measured: bool = True,
    ) -> dict[str, dict[str, HeadSums]]:
        """Return the signals of all ranks; in a rank that measured nothing, none.

        A stage may have no attention at all, and has those of the others nevertheless.
        """
        has_measured = has_measured or self.exchange.share.is_staged
        totals = torch.where(self._is_max, torch.where(added[0] > 0, torch.nan, largest), added[0])
        at = 0
        for layer, name, heads in self._layout:
            where = slice(at, at + heads)
            at += heads
            if has_measured and name != SQUARES:
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
            givers = self._givers.get(key, world_size())
            if name == SQUARES and bool((added[1, where] == givers).all()):
                found[key] = added[0, where].tolist()
        return found


CONTROL = 5
"""Numbers before the losses in the vector that is compared.

Trouble, minus the steps to the next sample that is wished for, its least interval, the gradients'
norm and its negative.
"""


def entries_of(
    own: Offer, share: RankShare | None = None, scale: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Return what a rank gives to the vector, by layer or key and by name.

    Args:
        own: what it has measured.
        share: gives common names, and places the heads here among all.
        scale: ranks over ranks of this stage, by which numbers to be added are multiplied.
    """
    share = share or RankShare()
    found: dict[str, dict[str, Any]] = {
        share.common(layer): {name: _placed(each, layer, share) for name, each in signals.items()}
        for layer, signals in own.sums.items()
    }
    whole = own.whole if share.is_staged else {}
    numbers = {
        **{key: [x / world_size() for x in each] for key, each in whole.items()},
        **own.squares,
    }
    for key, each in numbers.items():
        kind = GRADIENT if key.startswith(GRADIENT) else QUERY_KEY
        total = torch.tensor(list(each), dtype=torch.float64) * scale
        name = common_key(key, kind, share.prefix)
        found[name] = {SQUARES: Added(total, torch.ones_like(total))}
    return found


def _placed(each: HeadSums, layer: str, share: RankShare) -> HeadSums:
    """Return sums of the heads here among those of all heads of a layer; 0 rows for the others."""
    if layer not in share.heads:
        return each
    fill = -torch.inf if each.signal.reduction == "max" else 0.0
    total = share.spread(layer, each.total, fill)
    return HeadSums(each.signal, total, share.spread(layer, each.count, 0.0))


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
