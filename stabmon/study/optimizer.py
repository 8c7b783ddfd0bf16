"""AdamW and its schedule by the training settings.

For scripts whose framework brings none.
"""

from __future__ import annotations

import torch
from torch import nn

from stabmon.study.settings import TrainingSettings
from stabmon.tiny.recipe import Recipe


def make_optimizer(
    model: nn.Module, training: TrainingSettings, rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """Make an AdamW with weight decay on matrices, not on vectors.

    Args:
        model: the module.
        training: rate and weight decay.
        rate_factor: multiplies the rate.
    """
    return Recipe(weight_decay=training.weight_decay).optimizer(
        model, training.learning_rate * rate_factor
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, training: TrainingSettings
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a schedule with linear warm-up, then a cosine.

    Step it once per optimizer step.

    Args:
        optimizer: the optimizer.
        training: warm-up and total steps.
    """
    recipe = Recipe("cosine", training.warmup, training.steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: recipe.rate_at(done, 1.0))
