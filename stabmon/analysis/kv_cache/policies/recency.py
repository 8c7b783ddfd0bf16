"""Recency: the newest keys stay, and the first few."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.checks import check_count
from stabmon.analysis.kv_cache.policy import POLICIES, Checks, DecodeStep, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True)
class Recency(Policy):
    """The newest keys and the first ones, whatever their content.

    Much attention rests on the first keys.

    Keys keep their own positions, as everywhere here (the published method counts positions inside
    the cache instead).

    Args:
        sinks: number of first keys of each sample, which always stay; 0 for a plain window.

    Raises:
        ValueError: for a negative number.

    References:
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
    """

    name: ClassVar[str] = "recency"
    checks: ClassVar[Checks] = {"sinks": partial(check_count, least=0)}

    sinks: int = 4

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return each token's place in its sample, ``[B, H_kv, S]``; inf for the sinks."""
        place = layer.valid.cumsum(1).to(torch.float32)
        place = torch.where(layer.valid & (place <= self.sinks), torch.inf, place)
        return place[:, None].repeat(1, layer.key_heads, 1)

    def remember(self, layer: PromptLayer) -> dict[str, Tensor]:
        """Return a mark of the sinks."""
        return {"sink": self.scores(layer).isposinf()}

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Return the positions, ``[B, H_kv, M]``; infinite for the sinks."""
        return torch.where(step.memory["sink"], torch.inf, step.positions.to(torch.float32))


POLICIES.register(Recency.name, Recency)
