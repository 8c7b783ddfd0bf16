"""Train a model for a few dozen real steps and watch its scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stabmon._torch.isolation import random_state_kept
from stabmon._torch.outputs import loss_in
from stabmon.capture import AttentionCapture
from stabmon.check.config import DTYPES
from stabmon.signals.accumulator import Measurements, to_host
from stabmon.tiny.recipe import Recipe

SIGNALS = ("max_logit", "normalized_entropy", "saturated_fraction")


@dataclass(frozen=True, eq=False)
class ShortRun:
    """What a few steps at one rate showed. L looks; a look is a sampled step's forward, before the
    step is made.
    """

    rate: float
    losses: tuple[float, ...]
    """One a step; it ends where a loss is not finite."""
    steps: tuple[int, ...]
    """``[L]`` at which scores were looked at, counted from 0."""
    scores: np.ndarray
    """``[L, N]`` largest score of each head of the model."""
    saturated: np.ndarray
    """``[L, N]`` share of rows of each head that pass no gradient."""

    @property
    def finite(self) -> bool:
        """Whether every loss was."""
        return all(map(math.isfinite, self.losses))


def train_briefly(
    make: Callable[[], nn.Module],
    batches: Sequence[dict[str, Tensor]],
    recipe: Recipe,
    rate: float,
    dtype: str,
    every: int = 4,
    seed: int = 0,
) -> ShortRun:
    """Train a fresh model on ``batches``, one a step, with AdamW at ``rate`` by the recipe's
    schedule; neither model nor graph outlive it.

    Args:
        make: gives the model, with the same weights each time.
        batches: keyword arguments of its forward, with which it gives a loss.
        recipe: optimizer and schedule.
        rate: the peak rate.
        dtype: ``fp32``, or ``bf16`` or ``fp16`` for autocast, the latter with a gradient scaler.
        every: look at each so many steps, and at the last.
        seed: of dropout; the global generators are left as they were.
    """
    model = make().train()
    device = next(model.parameters()).device
    optimizer = recipe.optimizer(model, rate)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    measurements = Measurements(SIGNALS)
    capture = AttentionCapture(model, measurements.add, always_watch_functions=True)
    losses: list[float] = []
    looked: list[int] = []
    scores: list[np.ndarray] = []
    saturated: list[np.ndarray] = []
    with random_state_kept(model):
        torch.manual_seed(seed)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step, rate)
            looks = step % every == 0 or step == len(batches) - 1
            measurements.start(step)
            with contextlib.ExitStack() as stack:
                if looks:
                    stack.enter_context(capture)
                if dtype != "fp32":
                    stack.enter_context(torch.autocast(device.type, dtype=DTYPES[dtype]))
                loss = loss_in(model(**{name: value.to(device) for name, value in batch.items()}))
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} gives no loss for {', '.join(batch)}: a sweep needs "
                    "a model that does"
                )
            losses.append(float(loss.detach()))
            if looks:
                seen = to_host(measurements.sums)
                looked.append(step)
                scores.append(np.concatenate([each["max_logit"] for each in seen.values()]))
                saturated.append(
                    np.concatenate([each["saturated_fraction"] for each in seen.values()])
                )
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            scaler.step(optimizer)
            scaler.update()
    return ShortRun(rate, tuple(losses), tuple(looked), np.array(scores), np.array(saturated))
