"""Pack what ranks exchange at a sampled step: signals, losses, and the next sample."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.process_group import rank, world_size
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon.engine.ranks.agreement import ModelAgreement
from stabmon.engine.ranks.findings import nearest_cause
from stabmon.engine.ranks.losses import MOST_LOSSES, mean_losses, with_rank, worst_losses
from stabmon.engine.ranks.merge import Layout
from stabmon.engine.ranks.offer import LARGEST, OTHERS, SQUARES, Offer, Shared, entries_of, placed
from stabmon.records import LayerInfo, NonFinite
from stabmon.signals import SIGNALS, HeadSums

logger = logging.getLogger("stabmon")

CONTROL = 5
"""Numbers before the losses in the vector that is compared.

Trouble, minus the steps to the next sample that is wished for, its least interval, the gradients'
norm and its negative.
"""
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
        self.exchange, self._log_every = exchange, log_every
        self._agreement = ModelAgreement(model, exchange, stage)
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

    @property
    def facts(self) -> Mapping[str, LayerInfo]:
        """Facts about all layers, of all heads, where ranks hold different ones."""
        return self._agreement.facts

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
        losses = mean_losses(step, added[: 2 * slots].reshape(2, slots))
        worst = worst_losses(step, largest[CONTROL : CONTROL + slots])
        share = exchange.share
        sums = {
            share.common(layer): {
                name: placed(each, layer, share) for name, each in signals.items()
            }
            for layer, signals in own.sums.items()
        }
        squares: dict[str, list[float]] = {}
        groups: dict[str, list[float]] = {}
        if self._layout:
            rest = added[2 * slots :].reshape(2, -1), largest[CONTROL + slots :]
            sums = self._unpack(*rest, sums if share.is_whole else {}, has_measured=bool(own.sums))
            squares, groups = self._unpack_numbers(*rest)
        return Shared(sums, squares, groups, losses, worst)

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
                layout = self._agreement.common_layout(own)
                self._agree_on(layout or [])
            self.exchange.is_opened = layout is not None
        except Exception as error:
            self._layout, self._is_max = [], self._is_max[:0]
            if not self.exchange.together:
                raise
            if not isinstance(error, RankFailed):
                self._report(error)

    def _agree_on(self, layout: Layout) -> None:
        self._layout = layout
        self._is_max = torch.tensor(
            [
                name == LARGEST or (name != SQUARES and SIGNALS[name].reduction == "max")
                for _, name, heads in layout
                for _ in range(heads)
            ],
            dtype=torch.bool,
        )

    def share(self, found: NonFinite | None, step: int) -> NonFinite | None:
        """Return on rank 0 the finding nearest to a cause, on others their own.

        Args:
            found: this rank's finding.
            step: the optimizer step that it is of.
        """
        # before ranks have met, one that finds nothing does not come here, and takes no name
        name = self.exchange.name if self.exchange.has_met else self._early_name
        return nearest_cause(found, f"{name}/{step}", self.exchange.share)

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
                largest[CONTROL + slot] = with_rank(loss, rank())
        if self._layout:
            sums, maxima = self._pack_signals(
                entries_of(own, self.exchange.share, self._agreement.scale)
            )
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
            if has_measured and name not in OTHERS:
                own.setdefault(layer, {})[name] = HeadSums(
                    SIGNALS[name], totals[where], added[1, where]
                )
        return own

    def _unpack_numbers(
        self, added: Tensor, largest: Tensor
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return the sums of numbers to be added that all ranks gave, and the largest of others."""
        at, found, compared = 0, {}, {}
        for key, name, count in self._layout:
            where = slice(at, at + count)
            at += count
            givers = self._agreement.givers.get(key, world_size())
            if name == SQUARES and bool((added[1, where] == givers).all()):
                found[key] = added[0, where].tolist()
            elif name == LARGEST and bool((added[1, where] > 0).all()):
                compared[key] = largest[where].tolist()
        return found, compared
