"""AdamW and its schedule as the training settings say, for the scripts whose framework brings
none.
"""

from __future__ import annotations

import torch
from torch import nn

from stabmon.study.settings import TrainingSettings
from stabmon.tiny.recipe import Recipe


def make_optimizer(
    model: nn.Module, training: TrainingSettings, rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves vectors (biases, norm gains) alone; ``rate_factor``
    multiplies the rate.
    """
    return Recipe(weight_decay=training.weight_decay).optimizer(
        model, training.learning_rate * rate_factor
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, training: TrainingSettings
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from the first step on, then a cosine; step it once an optimizer step."""
    recipe = Recipe("cosine", training.warmup, training.steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: recipe.rate_at(done, 1.0))
