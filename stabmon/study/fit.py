"""Train some parameters of a small model on a corpus, stop where a validation part says so, and
measure on another.
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
    """How long and how fast, and when to stop."""

    patience: Count = 3
    """Validations in a row without a better loss after which training stops; the best parameters
    are kept.
    """


@dataclass(frozen=True)
class FitResult:
    """How a training ended; losses in nats a byte."""

    held_out: float
    """On blocks that neither trained nor chose anything."""
    validation: float
    """The best on the blocks that choose when to stop."""
    steps: int
    best_step: int
    parameters: int
    """How many numbers were trained."""


Watch = Callable[
    [torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler], AttentionStabilityMonitor
]
"""Makes the monitor of a training from its optimizer and schedule."""


def fit(
    model: Any,
    parameters: list[nn.Parameter],
    corpus: Corpus,
    phase: Phase,
    seed: int,
    watch: Watch | None = None,
) -> FitResult:
    """Train ``parameters`` of ``model``, all others being left alone, and leave it with those that
    did best.

    Batches depend on ``seed`` and the phase alone, so that variants see the same data in the same
    order.
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
        monitor = watch(optimizer, schedule) if watch else None
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
    """The held-out blocks of a corpus, ``[M, S]``: the half that chooses when to stop, and the half
    that is reported.
    """
    half = len(corpus.validation) // 2
    return corpus.validation[:half], corpus.validation[half:]


@torch.no_grad()
def loss_on(model: Any, blocks: Tensor) -> float:
    """Mean loss a byte over ``blocks`` ``[M, S]``; leaves the model training."""
    model.eval()
    total = math.fsum(
        model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(64)
    )
    model.train()
    return total / len(blocks)
