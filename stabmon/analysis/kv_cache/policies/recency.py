"""Recency: the newest keys stay, and the first few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.checks import check_count
from stabmon.analysis.kv_cache.policy import POLICIES, DecodeStep, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True)
class Recency(Policy):
    """Keep the newest keys and the first ones, on which much attention rests, whatever they hold.

    Keys keep their own positions, as everywhere here (the published method counts positions inside
    the cache instead).

    Args:
        sinks: first keys of each sample that always stay; 0 for a plain window.

    Raises:
        ValueError: for a negative number.

    References:
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
    """

    name: ClassVar[str] = "recency"

    sinks: int = 4

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, least=0)

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return each token's place in its sample, infinite for the sinks, ``[B, H_kv, S]``."""
        place = layer.valid.cumsum(1).to(torch.float32)
        place = torch.where(layer.valid & (place <= self.sinks), torch.inf, place)
        return place[:, None].repeat(1, layer.key_heads, 1)

    def remember(self, layer: PromptLayer) -> dict[str, Tensor]:
        """Return which keys are sinks."""
        return {"sink": self.scores(layer).isposinf()}

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Return the positions, infinite for the sinks, ``[B, H_kv, M]``."""
        return torch.where(step.memory["sink"], torch.inf, step.positions.to(torch.float32))


POLICIES.register(Recency.name, Recency)
