"""Training recipe of small models: AdamW and a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from stabmon._settings import Bounds, Count, Layer, SettingsError, read

MIN_RATE = 0.1
"""End of a line or a cosine, as a share of the peak rate."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up, then constant or falling to a tenth."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Bounds(0)] = 10
    """Warm-up steps."""
    total: Count = 400
    """Steps of the whole run, over which the schedule falls."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = BETAS
    clip: float = 1.0
    """Largest global norm of the gradient."""

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parse a schedule with its warm-up steps and the run's steps.

        ``constant``, ``linear`` or ``cosine``, as in ``cosine:20`` or ``cosine:20:400``.

        Raises:
            ValueError: for anything else.

        Example:
            >>> Recipe.parse("cosine:20").warmup
            20
        """
        name, *numbers = text.split(":")
        source = f"--schedule {text!r} (such as cosine:20:400)"
        if len(numbers) > 2 or not all(each.isdigit() for each in numbers):
            raise SettingsError(f"{source}: after the name come warm-up and total steps")
        steps = dict(zip(("warmup", "total"), map(int, numbers), strict=False))
        return read(cls, Layer({"schedule": name, **steps}, source))

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Make an AdamW with weight decay on matrices, not on vectors.

        Args:
            model: the module; only its trainable parameters are taken.
            rate: the learning rate.
        """
        trained = [each for each in model.parameters() if each.requires_grad]
        matrices, vectors = (
            [each for each in trained if each.ndim >= 2],
            [each for each in trained if each.ndim < 2],
        )
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=rate, betas=self.betas
        )

    def rate_at(self, step: int, peak: float) -> float:
        """Return the learning rate of a step.

        Args:
            step: counted from 0.
            peak: the peak rate.
        """
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        if self.schedule == "linear":
            return peak * (1 - (1 - MIN_RATE) * progress)
        if self.schedule == "cosine":
            return peak * (MIN_RATE + (1 - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))
        return peak
