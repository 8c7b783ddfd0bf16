"""AdamW and its schedule, for the scripts whose framework brings none."""

from __future__ import annotations

import math

import torch
from torch import nn

from stabmon.training.settings import TrainingSettings

MIN_RATE = 0.1
"""The cosine's end, as a share of the peak rate."""
BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, training: TrainingSettings, rate_factor: float = 1.0) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (biases, norm gains) alone; ``rate_factor`` multiplies the rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate * rate_factor, betas=BETAS)


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingSettings) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from the first step on, then a cosine down to ``MIN_RATE``; step it once an optimizer step."""

    def rate(done: int) -> float:
        if done < training.warmup:
            return (done + 1) / training.warmup
        progress = (done - training.warmup) / max(1, training.steps - training.warmup)
        return MIN_RATE + (1 - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
