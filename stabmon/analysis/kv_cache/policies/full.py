"""Full: no eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.policy import POLICIES, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True)
class Full(Policy):
    """Full cache, the baseline of any eviction."""

    name: ClassVar[str] = "full"
    evicts_in_decode: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = True

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return the same worth for every key, ``[B, H_kv, S]``."""
        attention = layer.operator
        return torch.ones(
            attention.batch, layer.key_heads, attention.keys, device=attention.query.device
        )

    def choose(self, scores: Tensor, budget: Tensor, candidates: Tensor) -> Tensor:
        """Return all candidates; see :meth:`Policy.choose`."""
        return candidates


POLICIES.register(Full.name, Full)
