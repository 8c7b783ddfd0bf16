"""Training of some parameters of a small model, with early stopping.

One part of the corpus trains, one chooses when to stop, and one is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._settings import Count
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.study.optimizer import make_optimizer, make_schedule
from stabmon.study.settings import TrainingSettings
from stabmon.tiny.corpus import Corpus


@dataclass(frozen=True)
class Phase(TrainingSettings):
    """Length, rate and stopping rule of a training."""

    patience: Count = 3
    """Validations in a row without a better loss before training stops.

    The best parameters are kept.
    """


@dataclass(frozen=True)
class FitResult:
    """Outcome of a training; losses in nats per byte."""

    held_out: float
    """Loss on blocks used neither for training nor for choosing anything."""
    validation: float
    """Best loss on the blocks for choosing when to stop."""
    steps: int
    best_step: int
    parameters: int
    """Number of trained parameters."""


MonitorFactory = Callable[
    [torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler], AttentionStabilityMonitor
]
"""Function from a training's optimizer and schedule to its monitor."""


def fit(
    model: Any,
    parameters: list[nn.Parameter],
    corpus: Corpus,
    phase: Phase,
    seed: int,
    make_monitor: MonitorFactory | None = None,
    on_step: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> FitResult:
    """Train ``parameters`` of ``model`` and keep the best.

    All other parameters are left alone. Batches depend on ``seed`` and the phase alone, so that
    variants see the same data in the same order.

    Args:
        model: a model of transformers with a loss.
        parameters: the parameters to train.
        corpus: the text.
        phase: length, rate and stopping rule.
        seed: of the order of the data.
        make_monitor: makes the monitor; None to train unwatched.
        on_step: called after each step with its number and its loss.
    """
    validation, held_out = split(corpus)
    wanted = {id(each) for each in parameters}
    for each in model.parameters():
        each.requires_grad_(id(each) in wanted)
    best, best_step, worse, step = loss_on(model, validation), 0, 0, 0
    kept = [each.detach().clone() for each in parameters]
    if parameters and phase.steps:
        optimizer = make_optimizer(model, phase)
        schedule = make_schedule(optimizer, phase)
        monitor = make_monitor(optimizer, schedule) if make_monitor else None
        every = phase.validate_every or phase.steps
        for step, index in enumerate(corpus.stream(phase.steps, phase.batch, seed), start=1):
            tokens = corpus.train[index]
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, phase.clip)
            optimizer.step()
            schedule.step()
            if monitor is not None:
                monitor.on_step(loss=loss)
            optimizer.zero_grad()
            on_step(step, loss.detach())
            if step % every and step != phase.steps:
                continue
            now = loss_on(model, validation)
            if now < best:
                best, best_step, worse = now, step, 0
                kept = [each.detach().clone() for each in parameters]
            else:
                worse += 1
                if worse >= phase.patience:
                    break
        if monitor is not None:
            monitor.close()
        with torch.no_grad():
            for each, value in zip(parameters, kept, strict=True):
                each.copy_(value)
    return FitResult(
        loss_on(model, held_out), best, step, best_step, sum(each.numel() for each in parameters)
    )


def split(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Split the held-out blocks of a corpus, ``[M, S]``, into two halves.

    The first half chooses when to stop, the second is reported.
    """
    half = len(corpus.validation) // 2
    return corpus.validation[:half], corpus.validation[half:]


@torch.no_grad()
def loss_on(model: Any, blocks: Tensor) -> float:
    """Return the mean loss per byte over ``blocks`` ``[M, S]``.

    Leaves the model in training mode.
    """
    model.eval()
    total = math.fsum(
        model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(64)
    )
    model.train()
    return total / len(blocks)
