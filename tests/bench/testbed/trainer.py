"""Train one recipe: plain, watched or guarded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabmon
import stabmon.tiny.recipe as optimizing
from stabmon.records import Reading
from stabmon.sinks import Sink
from stabmon.tiny.corpus import default_text, library_text
from tests.bench.references.mitigations import MITIGATIONS
from tests.bench.testbed.inject_fault import FAULTS
from tests.bench.testbed.models import build
from tests.bench.testbed.recipes import Recipe

GIVEN_UP = 40
"""Steps in a row without a finite loss before a run is given up."""


@dataclass(frozen=True, eq=False)
class Run:
    """Outcome of training a recipe."""

    recipe: Recipe
    losses: np.ndarray
    """Training losses ``[steps]``; NaN after the run was given up."""
    validation: float
    """Loss on held-back text, the same for all variants of a recipe."""
    readings: list[Reading] = field(default_factory=list)
    """Reading of each sampled step, where the run was watched."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Audit of interventions, where the run was guarded."""
    errors: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Keep(Sink):
    """Sink that keeps readings and interventions."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.records: list[dict[str, Any]] = []

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self.readings.append(reading)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))


def train(
    recipe: Recipe, config: str | None = None, log_every: int = 1, mitigation: str = ""
) -> Run:
    """Train ``recipe`` on one thread.

    Args:
        recipe: what to train.
        config: the monitor's configuration; None for no monitor.
        log_every: the monitor's interval.
        mitigation: name of one of
            :data:`~tests.bench.references.mitigations.MITIGATIONS` to train under.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    model, logits = build(recipe.shape)
    how = optimizing.Recipe(recipe.schedule, recipe.warmup, recipe.steps, recipe.weight_decay)
    optimizer = how.optimizer(model, recipe.rate)
    fault = FAULTS[recipe.fault](model, optimizer, **recipe.settings)
    fault.after_step(0)
    keep, losses = Keep(), np.full(recipe.steps, np.nan)
    monitor = None
    if config is not None:
        monitor = stabmon.AttentionStabilityMonitor(
            model, optimizer, config=config, log_every=log_every, schedule="fixed", sinks=[keep]
        )
    data, noise = (
        torch.Generator().manual_seed(recipe.seed),
        torch.Generator().manual_seed(recipe.seed + 1),
    )
    mitigating = contextlib.ExitStack()
    if mitigation:
        mitigating.enter_context(MITIGATIONS[mitigation](model, optimizer))
    for step in range(1, recipe.steps + 1):
        tokens, other = (_batch(recipe, text, data) for text in (recipe.text, _other(recipe.text)))
        tokens = fault.batch(step, tokens, other, noise)
        for group in optimizer.param_groups:
            group["lr"] = how.rate_at(step - 1, recipe.rate) * fault.rate_factor(step)
        optimizer.zero_grad()
        loss = _loss(logits(tokens), tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        fault.before_step(step)
        optimizer.step()
        fault.after_step(step)
        losses[step - 1] = loss.item()
        if monitor is not None:
            monitor.on_step(loss=loss)
            if monitor.stop_reason is not None:
                break
        if step > GIVEN_UP and not np.isfinite(losses[step - GIVEN_UP : step]).any():
            break
    mitigating.close()
    validation = _validation(recipe, model, logits)
    errors = {} if monitor is None else dict(monitor.errors)
    if monitor is not None:
        monitor.close()
    return Run(
        recipe, losses, validation, keep.readings, keep.records, errors, time.perf_counter() - began
    )


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def _validation(recipe: Recipe, model: nn.Module, logits: Any) -> float:
    """Return the mean loss on eight batches never trained on."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [_batch(recipe, recipe.text, generator, kept_back=True) for _ in range(8)]
    losses = [_loss(logits(tokens), tokens).item() for tokens in batches]
    return float(np.mean(losses))


def _batch(
    recipe: Recipe, text: str, generator: torch.Generator, kept_back: bool = False
) -> Tensor:
    """Return bytes ``[batch, S]``; ``kept_back`` ones from the last tenth of the text."""
    size, length = recipe.batch, recipe.shape.length
    if text == "copy":
        half = torch.randint(0, 64, (size, length // 2), generator=generator)
        return torch.cat([half, half], dim=1)
    bytes_ = _bytes(text)
    border = int(0.9 * len(bytes_))
    low, high = (border, len(bytes_)) if kept_back else (0, border)
    starts = torch.randint(low, high - length, (size, 1), generator=generator)
    return bytes_[starts + torch.arange(length)].long()


def _other(text: str) -> str:
    return "topics" if text == "library" else "library"


@cache
def _bytes(text: str) -> Tensor:
    """Return the text, one byte per number, 2 MB at most."""
    _, raw = default_text() if text == "topics" else library_text()
    return torch.frombuffer(bytearray(raw[:2_000_000]), dtype=torch.uint8)
