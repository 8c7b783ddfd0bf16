"""Exchange readings and findings between ranks without leaving one waiting."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stabmon._torch.process_group import collective_device, default_store, gather, rank, world_size
from stabmon.records import NonFinite
from stabmon.signals import SIGNALS, HeadSums

logger = logging.getLogger("stabmon")

Sums = Mapping[str, Mapping[str, HeadSums]]
_WAIT = timedelta(seconds=10)
"""Longest wait of rank 0 for the findings of others, once a non-finite episode."""
_CAUSES_FIRST = ("parameter", "input", "activation", "score", "loss", "gradient")
"""Kinds of findings, those that name a cause first.

A bad gradient reaches every rank, its cause is on one.
"""
_monitors = itertools.count()


class RankReducer:
    """Means and maxima of signals over the ranks of the default process group.

    A sampled step costs two collectives of a vector each.

    At the first sampled step the ranks compare what they are about to send (two integers); if
    layers differ, as between pipeline stages, each keeps to its own from then on. A rank that has
    nothing to give, or something else than agreed, sends neutral values of the agreed length rather
    than none.

    Args:
        model: where its heads are split over ranks (tensor parallel), each rank keeps to its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layout: list[tuple[str, str, int]] = []
        self._agreed: bool | None = False if has_split_heads(model) else None
        self._is_max = torch.zeros(0, dtype=torch.bool)
        self._number = next(_monitors)

    @property
    def active(self) -> bool:
        """Return whether there are other ranks to reduce with."""
        return world_size() > 1 and self._agreed is not False

    def reduce(
        self, sums: Sums, more: Sequence[float] = ()
    ) -> tuple[dict[str, dict[str, HeadSums]], list[float] | None]:
        """Reduce signals over ranks, which must all call this at the same steps.

        Args:
            sums: this rank's sums, by layer and signal.
            more: further numbers, as many on all ranks, which travel with the maxima.

        Returns:
            The sums of all ranks, and the largest of each further number over ranks; None instead
            of these at steps at which ranks exchange nothing, which are the same on all ranks.
        """
        own = {layer: dict(signals) for layer, signals in sums.items()}
        if not self.active:
            return own, None
        layout = [
            (layer, name, len(each.total))
            for layer, signals in own.items()
            for name, each in signals.items()
        ]
        if self._agreed is None and not self._agree(layout):
            return own, None
        added, largest = self._pack(own, layout)
        largest = torch.cat([largest, largest.new_tensor(more)])
        dist.all_reduce(added, dist.ReduceOp.SUM)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        largest, found = largest.cpu().split([added.shape[1], len(more)])
        own = self._unpack(added.cpu(), largest, own) if layout == self._layout else own
        return own, found.tolist()

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
        keys = [f"stabmon/{self._number}/{step}/{each}" for each in range(world_size())]
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

    def _agree(self, layout: list[tuple[str, str, int]]) -> bool:
        """Compare the layouts of all ranks; postpone it while some rank has none."""
        digest = int.from_bytes(hashlib.sha256(repr(layout).encode()).digest()[:6], "big")
        gathered = gather(torch.tensor([float(len(layout)), float(digest)], dtype=torch.float64))
        if not bool(gathered[:, 0].all()):
            return False
        self._layout, self._agreed = layout, bool((gathered == gathered[0]).all())
        self._is_max = torch.tensor(
            [SIGNALS[name].reduction == "max" for _, name, heads in layout for _ in range(heads)]
        )
        if not self._agreed:
            logger.warning(
                "Ranks hold different attention layers: each reports its own, and rank 0's are "
                "recorded."
            )
        return self._agreed

    def _pack(self, own: Sums, layout: list[tuple[str, str, int]]) -> tuple[Tensor, Tensor]:
        """Return the ``[2, N]`` values to add and the ``[N]`` values to maximise.

        N is the number of heads of all layers and signals. Added are totals (for a maximum: 1 where
        it is NaN) and counts.
        """
        heads = sum(count for *_, count in self._layout)
        added, largest = (
            torch.zeros(2, heads, dtype=torch.float64),
            torch.full((heads,), -torch.inf, dtype=torch.float64),
        )
        if layout == self._layout:
            try:
                entries = [each for signals in own.values() for each in signals.values()]
                device = entries[0].total.device
                totals = torch.cat([each.total.double().to(device) for each in entries]).cpu()
                counts = torch.cat([each.count.double().to(device) for each in entries]).cpu()
                added = torch.stack(
                    [torch.where(self._is_max, totals.isnan().double(), totals), counts]
                )
                largest = torch.where(self._is_max & ~totals.isnan(), totals, -torch.inf)
            except Exception as error:  # others wait for this rank's vector
                logger.error("this rank's readings are left out of a sampled step: %s", error)
        device = collective_device()
        return added.to(device), largest.to(device)

    def _unpack(
        self, added: Tensor, largest: Tensor, own: dict[str, dict[str, HeadSums]]
    ) -> dict[str, dict[str, HeadSums]]:
        totals = torch.where(self._is_max, torch.where(added[0] > 0, torch.nan, largest), added[0])
        at = 0
        for layer, name, heads in self._layout:
            where = slice(at, at + heads)
            own[layer][name] = HeadSums(own[layer][name].signal, totals[where], added[1, where])
            at += heads
        return own


def has_split_heads(model: nn.Module) -> bool:
    """Return whether each rank has other heads, as under tensor parallelism."""
    meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
    return any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes if mesh is not None)
