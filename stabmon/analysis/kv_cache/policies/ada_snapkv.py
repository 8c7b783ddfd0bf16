"""Ada-KV on SnapKV: a layer's heads share one budget by the worth of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.checks import check_number
from stabmon.analysis.kv_cache.policies.snapkv import SnapKV
from stabmon.analysis.kv_cache.policy import POLICIES, Checks, best


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """Choice of the best keys over all heads of a layer together.

    Heads hold different numbers of keys.

    Unused slots of a head stay empty and cost memory: the layer is as long as its fullest head.

    Args:
        pool: odd width of the average over neighbouring keys.
        floor: share of the even budget guaranteed to every head, in [0, 1].

    Raises:
        ValueError: for values out of range.

    References:
        Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", 2024.
    """

    name: ClassVar[str] = "ada_snapkv"

    checks: ClassVar[Checks] = SnapKV.checks | {"floor": partial(check_number, least=0.0, most=1.0)}

    floor: float = 0.2

    def choose(self, scores: Tensor, budget: Tensor, candidates: Tensor) -> Tensor:
        """Choose each head's guaranteed keys, then the best of all heads.

        See :meth:`Policy.choose`.
        """
        batch, heads, slots = scores.shape
        sure = best(scores, (budget * self.floor).long()[:, None].expand(batch, heads), candidates)
        rest = budget * heads - sure.sum((1, 2))
        more = best(scores.flatten(1), rest, (candidates & ~sure).flatten(1))
        return torch.logical_or(sure, more.view(batch, heads, slots))


POLICIES.register(AdaSnapKV.name, AdaSnapKV)
