"""A few dozen real training steps, with the scores sampled."""

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
    """Losses and scores of a few steps at one rate.

    L samples; a sample is a step's forward, before the step is made. N heads in all layers.
    """

    rate: float
    losses: tuple[float, ...]
    """Loss of each step, up to the first non-finite one."""
    steps: tuple[int, ...]
    """Sampled steps ``[L]``, counted from 0."""
    scores: np.ndarray
    """Largest score of each head, ``[L, N]``."""
    saturated: np.ndarray
    """Share of each head's rows without a gradient, ``[L, N]``."""

    @property
    def finite(self) -> bool:
        """Return whether every loss was finite."""
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
    """Train a fresh model with AdamW for a few steps and sample its scores.

    Neither model nor graph outlive the call.

    Args:
        make: returns the model, with the same weights each time.
        batches: keyword arguments of its forward, one mapping per step, for which it returns a
            loss.
        recipe: optimizer and schedule.
        rate: the peak rate.
        dtype: ``fp32``, or ``bf16`` or ``fp16`` for autocast, the latter with a gradient scaler.
        every: sample each so many steps, and the last.
        seed: of dropout; the global generators are left as they were.

    Raises:
        ValueError: if the model returns no loss.
    """
    model = make().train()
    device = next(model.parameters()).device
    optimizer = recipe.optimizer(model, rate)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    measurements = Measurements(SIGNALS)
    capture = AttentionCapture(model, measurements.add, always_watch_functions=True)
    losses: list[float] = []
    sampled_steps: list[int] = []
    scores: list[np.ndarray] = []
    saturated: list[np.ndarray] = []
    with random_state_kept(model):
        torch.manual_seed(seed)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step, rate)
            sampled = step % every == 0 or step == len(batches) - 1
            measurements.start(step)
            with contextlib.ExitStack() as stack:
                if sampled:
                    stack.enter_context(capture)
                if dtype != "fp32":
                    stack.enter_context(torch.autocast(device.type, dtype=DTYPES[dtype]))
                loss = loss_in(model(**{name: value.to(device) for name, value in batch.items()}))
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} returns no loss for {', '.join(batch)}: sweep a "
                    "model that does"
                )
            losses.append(float(loss.detach()))
            if sampled:
                measured = to_host(measurements.sums)
                sampled_steps.append(step)
                scores.append(np.concatenate([each["max_logit"] for each in measured.values()]))
                saturated.append(
                    np.concatenate([each["saturated_fraction"] for each in measured.values()])
                )
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            scaler.step(optimizer)
            scaler.update()
    return ShortRun(
        rate, tuple(losses), tuple(sampled_steps), np.array(scores), np.array(saturated)
    )
