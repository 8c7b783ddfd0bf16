"""What goes wrong in a run, at each step of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.bench.byte_gpt.model import BYTES, Block, ByteGPT
from tests.bench.byte_gpt.recipe import Recipe


class Faults:
    """The faults of a recipe, at each step."""

    def __init__(self, recipe: Recipe, model: ByteGPT, seed: int) -> None:
        self.recipe, self.model = recipe, model
        self.generator = torch.Generator().manual_seed(777 + seed)

    def apply(
        self, step: int, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Change batch, weights, scale and rates at a step, counted from 0."""
        factors = {"": 1.0}
        for fault in self.recipe.faults:
            if not fault.start <= step < fault.stop:
                continue
            if fault.name == "random_batch":
                tokens = self._noise(tokens)
            if fault.name in ("random_batch", "random_labels"):
                targets = self._noise(targets)
            elif fault.name.startswith("rate"):
                factors[fault.name[5:]] = fault.value
            elif fault.name == "weight_decay":
                for group in optimizer.param_groups:
                    group["weight_decay"] = fault.value
            elif step == fault.start:
                self._change_weights(fault.name, fault.value)
        if self.recipe.scale_ramp:
            start, stop, value = self.recipe.scale_ramp
            share = min(1, max(0, (step - start) / max(1, stop - start)))
            for block in self._blocks():
                block.attn.scale_factor = value**share
        rate, caps = rate_at(self.recipe, step) * factors[""], dict(self.recipe.rate_caps)
        for group in optimizer.param_groups:
            own = group["name"] == "query_key" and step >= self.recipe.query_key_rate_from
            factor = self.recipe.query_key_rate if own else 1.0
            used = rate * factor * factors.get(group["name"], 1.0)
            group["lr"] = min(used, caps.get(group["name"], used))
        return tokens, targets

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randint(0, BYTES, like.shape, generator=self.generator)

    def _blocks(self) -> list[Block]:
        return [block for block in self.model.blocks if isinstance(block, Block)]

    def _change_weights(self, name: str, factor: float) -> None:
        if name == "embedding_nan":
            self.model.emb.weight.data[101, 0] = math.nan
            return
        weights = {
            "embedding": [self.model.emb.weight],
            "mlp": [block.up.weight for block in self._blocks()],
            "query_key": [
                each.weight for block in self._blocks() for each in (block.attn.q, block.attn.k)
            ],
        }
        for weight in weights[name]:
            weight.data.mul_(factor)


def rate_at(recipe: Recipe, step: int) -> float:
    """Return the rate of a step, counted from 0, before any factor of a group."""
    rate = recipe.rate * min(1, (step + 1) / max(1, recipe.warmup))
    if recipe.schedule == "cosine":
        share = max(0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
        rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
    return rate
