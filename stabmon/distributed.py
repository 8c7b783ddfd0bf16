"""Reduce a sampled step over ranks with one collective, in a way that no rank can be left waiting by a fault of ours."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from stabmon.signals import HeadSums

logger = logging.getLogger("stabmon")

Sums = Mapping[str, Mapping[str, HeadSums]]


class RankReducer:
    """Means and maxima over the ranks of the default process group.

    At the first sampled step the ranks compare what they are about to send (two integers); if layers differ, as between pipeline stages,
    each keeps to its own from then on. Later steps gather one vector of agreed length. A rank that has nothing to give, or something
    else than agreed, sends a vector marked empty rather than none.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, str, int]] | None = None
        self._agreed: bool | None = None

    @property
    def active(self) -> bool:
        """Whether there are other ranks to hear from."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and self._agreed is not False

    def reduce(self, sums: Sums) -> dict[str, dict[str, HeadSums]]:
        """The signals over all ranks; every rank must call this at the same sampled steps."""
        own = {layer: dict(signals) for layer, signals in sums.items()}
        if not self.active:
            return own
        layout = [(layer, name, len(each.total)) for layer, signals in own.items() for name, each in signals.items()]
        if self._agreed is None:
            self._layout = layout
            self._agreed = self._compare(layout)
            if not self._agreed:
                logger.warning("Ranks hold different attention layers: each reports its own, and rank 0's are recorded.")
                return own
        assert self._layout is not None
        length = 1 + 2 * sum(heads for *_, heads in self._layout)
        vector = torch.zeros(length, dtype=torch.float64)
        if layout == self._layout and layout:
            parts = [
                torch.cat([each.total.double(), each.count.double()]) for signals in own.values() for each in signals.values()
            ]
            vector = torch.cat([torch.ones(1, dtype=torch.float64), torch.cat(parts).cpu()])
        gathered = self._gather(vector)
        gathered = gathered[gathered[:, 0] > 0]
        return self._unpack(gathered, own) if len(gathered) and layout == self._layout else own

    def _unpack(self, gathered: Tensor, own: dict[str, dict[str, HeadSums]]) -> dict[str, dict[str, HeadSums]]:
        at = 1
        for layer, name, heads in self._layout or []:
            each = own[layer][name]
            totals, counts = gathered[:, at : at + heads], gathered[:, at + heads : at + 2 * heads]
            total = totals.amax(0) if each.signal.reduction == "max" else totals.sum(0)
            own[layer][name] = HeadSums(each.signal, total, counts.sum(0))
            at += 2 * heads
        return own

    @staticmethod
    def _compare(layout: list[tuple[str, str, int]]) -> bool:
        digest = int.from_bytes(hashlib.sha256(repr(layout).encode()).digest()[:6], "big")
        own = torch.tensor([float(len(layout)), float(digest)], dtype=torch.float64)
        gathered = RankReducer._gather(own)
        return bool((gathered == gathered[0]).all()) and len(layout) > 0

    @staticmethod
    def _gather(vector: Tensor) -> Tensor:
        """``[ranks, length]`` on the CPU."""
        device = "cpu" if dist.get_backend() != "nccl" else torch.device("cuda", torch.cuda.current_device())
        vector = vector.to(device)
        parts = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, vector)
        return torch.stack(parts).cpu()
