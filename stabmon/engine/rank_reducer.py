"""What ranks tell each other, in ways in which no rank can be left waiting by a fault of ours."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping
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
"""How long rank 0 waits for the findings of others, once a misfortune."""
_monitors = itertools.count()


class RankReducer:
    """Means and maxima over the ranks of the default process group, with two collectives a sampled
    step, of a vector each.

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
        """Whether there are other ranks to hear from."""
        return world_size() > 1 and self._agreed is not False

    def reduce(self, sums: Sums) -> dict[str, dict[str, HeadSums]]:
        """The signals over all ranks; every rank must call this at the same sampled steps."""
        own = {layer: dict(signals) for layer, signals in sums.items()}
        if not self.active:
            return own
        layout = [
            (layer, name, len(each.total))
            for layer, signals in own.items()
            for name, each in signals.items()
        ]
        if self._agreed is None and not self._agree(layout):
            return own
        added, largest = self._pack(own, layout)
        dist.all_reduce(added, dist.ReduceOp.SUM)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return self._unpack(added.cpu(), largest.cpu(), own) if layout == self._layout else own

    def share(self, found: NonFinite | None, step: int) -> NonFinite | None:
        """On rank 0 the finding of all ranks that tells most; on others their own. No collective:
        rank 0 reads what others left.

        The rank that found it is named in ``detail``.
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
        # some rank saw no misfortune, or found it too late: its finding is missing, and no more
        except Exception as error:
            logger.info("no finding of some rank for step %s: %s", step, error)
        told = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
        findings = [
            NonFinite.from_dict(each, detail=f"{each['detail']} (rank {number})")
            for number, each in enumerate(told)
            if each
        ]
        return min(
            findings,
            key=lambda each: (_TELLING.index(each.kind), each.layer is None),
            default=found,
        )

    def _agree(self, layout: list[tuple[str, str, int]]) -> bool:
        """Compare layouts; put off while some rank has none."""
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
        """What is added up over ranks, a total (of a maximum: whether it is NaN) and a count a
        head, and of what the maximum is taken.
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


_TELLING = ("parameter", "input", "activation", "score", "loss", "gradient")
"""Kinds of findings, those that name a cause first: a bad gradient reaches every rank, its cause is
on one.
"""


def has_split_heads(model: nn.Module) -> bool:
    """Whether the model is tensor parallel: then head 0 of one rank is not head 0 of another."""
    meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
    return any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes if mesh is not None)
