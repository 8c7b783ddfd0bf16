"""Ada-KV on SnapKV: the heads of a layer share their keys by what these are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.checks import check_number
from stabmon.analysis.kv_cache.policies.snapkv import SnapKV
from stabmon.analysis.kv_cache.policy import POLICIES, best


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """Choose the best keys over all heads of a layer together, so that heads hold different numbers
    of them.

    Slots that a head does not use stay empty, and hold memory: the layer is as long as its fullest
    head.

    Args:
        pool: odd width of the average over neighbouring keys.
        floor: share of the even budget that every head gets before, in [0, 1].

    Raises:
        ValueError: for values out of range.

    References:
        Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", 2024.
    """

    name: ClassVar[str] = "ada_snapkv"

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("floor", self.floor, least=0.0, most=1.0)

    def choose(self, scores: Tensor, budget: Tensor, candidates: Tensor) -> Tensor:
        """Return each head's sure keys, and the best of all heads for the rest of the budget, ``[B,
        H_kv, M]`` bool.
        """
        batch, heads, slots = scores.shape
        sure = best(scores, (budget * self.floor).long()[:, None].expand(batch, heads), candidates)
        rest = budget * heads - sure.sum((1, 2))
        more = best(scores.flatten(1), rest, (candidates & ~sure).flatten(1))
        return torch.logical_or(sure, more.view(batch, heads, slots))


POLICIES.register(AdaSnapKV.name, AdaSnapKV)
