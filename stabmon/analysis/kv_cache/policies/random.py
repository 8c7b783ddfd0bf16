"""Random: arbitrary keys stay, and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.policy import POLICIES, DecodeStep, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True)
class Random(Policy):
    """Keys drawn at random, a lower bound for any choice.

    Every key gets one random number, from a generator of its own that leaves the global one alone,
    and keeps it while decoding; so new and old keys have the same chance.

    Args:
        seed: seed of the draw; layers and prompts of other lengths draw other keys.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return random numbers in (0, 1], ``[B, H_kv, S]``."""
        attention = layer.operator
        place = sum(ord(letter) * 31**index for index, letter in enumerate(layer.name)) % 2**31
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        draw = 1 - torch.rand(attention.batch, layer.key_heads, attention.keys, generator=generator)
        return draw.to(attention.query.device)

    def remember(self, layer: PromptLayer) -> dict[str, Tensor]:
        """Return the draw."""
        return {"draw": self.scores(layer)}

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Return the draw, completed for the new keys, ``[B, H_kv, M]``."""
        draw = step.memory["draw"]
        fresh = draw == 0  # keys after the prompt have no draw yet
        if bool(fresh.any()):
            generator = torch.Generator().manual_seed(self.seed + int(step.positions.max().item()))
            numbers = 1 - torch.rand(draw.shape, generator=generator).to(draw)
            draw.copy_(torch.where(fresh, numbers, draw))
        return draw


POLICIES.register(Random.name, Random)
