"""Train one recipe: plain, watched or guarded, by a loop that sets each group's rate itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stabmon
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks import Sink
from tests.bench.byte_gpt.batches import Batches
from tests.bench.byte_gpt.faults import Faults
from tests.bench.byte_gpt.model import ByteGPT, group_of
from tests.bench.byte_gpt.recipe import Recipe
from tests.bench.references.mitigations import MITIGATIONS

SEED = 11
GIVEN_UP = 25
"""Steps in a row without a finite loss after which a run is given up."""
LOSS_SCALE = 1024.0
"""Static factor of the loss where something is in float16."""


@dataclass(frozen=True, eq=False)
class Run:
    """Outcome of training a recipe."""

    recipe: Recipe
    seed: int
    losses: np.ndarray
    """Training losses ``[steps]``, fewer where the run was given up."""
    validation: float
    readings: list[Reading] = field(default_factory=list)
    """Reading of each sampled step, where the run was watched."""
    issues: list[StabilityIssue] = field(default_factory=list)
    interventions: list[dict[str, Any]] = field(default_factory=list)
    """Audit of interventions, where the run was guarded."""
    errors: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    """CPU time of the training loop."""


class Keep(Sink):
    """Sink that keeps readings, issues and interventions."""

    def __init__(self, readings: bool) -> None:
        self.keeps_readings = readings
        self.readings: list[Reading] = []
        self.issues: list[StabilityIssue] = []
        self.interventions: list[dict[str, Any]] = []

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        if self.keeps_readings:
            self.readings.append(reading)

    def write_issues(self, issues: Iterable[StabilityIssue]) -> None:
        self.issues += issues

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self.interventions.append(dict(record))


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer, a group for each part of the model."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(group_of(name), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "name": name,
            "weight_decay": 0.0 if name in ("norm", "embedding") else recipe.weight_decay,
        }
        for name, parameters in parts.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, recipe.beta2), eps=1e-8)


def train(
    recipe: Recipe,
    seed: int = SEED,
    config: str | None = None,
    log_every: int = 1,
    *,
    keep_readings: bool = True,
    change_model: Callable[[ByteGPT], None] | None = None,
    after_step: Callable[[ByteGPT], None] | None = None,
    mitigation: str = "",
    **settings: Any,
) -> Run:
    """Train ``recipe`` on one thread.

    Args:
        recipe: what to train.
        seed: of the weights and the batches.
        config: the monitor's configuration, ``observe`` or ``guard``; None for no monitor.
        log_every: the monitor's interval.
        keep_readings: keep the readings in the returned run.
        change_model: called with the model before training.
        after_step: called with the model after each optimizer step, before the monitor's.
        mitigation: name of one of
            :data:`~tests.bench.references.mitigations.MITIGATIONS` to train under.
        settings: further settings of the monitor.
    """
    torch.set_num_threads(1)
    batches, model = Batches(recipe, seed), ByteGPT(recipe, seed)
    if change_model is not None:
        change_model(model)
    optimizer, faults = make_optimizer(recipe, model), Faults(recipe, model, seed)
    if recipe.precision == "bfloat16_weights":
        model.bfloat16()
    keep, losses, monitor = Keep(keep_readings), [], None
    errors: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        if config is not None:
            monitor = stack.enter_context(
                stabmon.AttentionStabilityMonitor(
                    model,
                    optimizer=optimizer,
                    config=config,
                    log_every=log_every,
                    sinks=[keep],
                    **settings,
                )
            )
        if mitigation:
            stack.enter_context(MITIGATIONS[mitigation](model, optimizer))
        began = time.process_time()
        for step in range(recipe.steps):
            batch = faults.apply(step, optimizer, *batches.next())
            loss = _step(recipe, model, optimizer, *batch)
            if after_step is not None:
                after_step(model)
            if monitor is not None:
                monitor.on_step(loss=loss)
            losses.append(loss.item())
            if len(losses) >= GIVEN_UP and not np.isfinite(losses[-GIVEN_UP:]).any():
                break
        seconds = time.process_time() - began
        errors = {} if monitor is None else dict(monitor.errors)
    validation = _validation(model, batches)
    return Run(
        recipe,
        seed,
        np.array(losses),
        validation,
        keep.readings,
        keep.issues,
        keep.interventions,
        errors,
        seconds,
    )


def _step(
    recipe: Recipe,
    model: ByteGPT,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    targets: Tensor,
) -> Tensor:
    """Make one optimizer step and return the loss before it."""
    precision = recipe.precision
    formats = {"autocast_bfloat16": torch.bfloat16, "autocast_float16": torch.float16}
    with torch.autocast("cpu", formats.get(precision), enabled=precision in formats):
        loss: Tensor = model(tokens, targets)
    optimizer.zero_grad(set_to_none=True)
    is_scaled = "_float16" in precision or precision.startswith("float16")
    (loss * LOSS_SCALE if is_scaled else loss).backward()  # type: ignore[no-untyped-call]
    if is_scaled:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(LOSS_SCALE)
    if recipe.clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss


@torch.no_grad()
def _validation(model: ByteGPT, batches: Batches) -> float:
    """Return the mean loss of eight batches never trained on."""
    model.eval()
    generator = torch.Generator().manual_seed(5)
    losses = [model(*batches.kept_back(generator)).item() for _ in range(8)]
    return float(np.mean(losses))
