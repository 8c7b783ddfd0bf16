r"""Train a small GPT with a plain PyTorch loop, monitored.

python train/plain_loop.py configs/train_plain_loop.yaml run_dir=runs/plain
python train/plain_loop.py configs/train_plain_loop.yaml run_dir=runs/plain resume=true \
    training.steps=800
python train/plain_loop.py configs/train_plain_loop.yaml run_dir=runs/plain-provoked \
    provoke=scale_qk
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, GPTShape
from run import Outcome, Run, finish, main, start
from settings import RunSettings
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import stabmon
from stabmon.config import load_config
from stabmon.study.optimizer import make_optimizer, make_schedule


@dataclass(frozen=True)
class Settings(RunSettings):
    """Settings of the script; ``loggers`` name stabmon's sinks.

    A plain loop has no framework with loggers of its own.
    """

    model: GPTShape = field(default_factory=GPTShape)


def train(settings: Settings) -> Outcome:
    """Train by the settings; return the outcome."""
    run = start(settings, "checkpoints/step=*.pt")
    training = settings.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    model = GPT(settings.model).to(device)
    optimizer = make_optimizer(
        model, training, settings.high_lr.factor if settings.provoke == "high_lr" else 1.0
    )
    schedule = make_schedule(optimizer, training)
    monitor = make_monitor(settings, model, optimizer, schedule)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule} | (
        {"monitor": monitor} if monitor else {}
    )
    if run.checkpoint:
        load(run.checkpoint, parts, device)

    steps = tqdm(
        range(run.done + 1, training.steps + 1),
        initial=run.done,
        total=training.steps,
        unit="step",
        disable=None,
    )
    for step in steps:
        tokens = run.corpus.train[run.stream[step - 1]].to(device)
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        schedule.step()
        if settings.provoke == "scale_qk":
            settings.scale_qk.apply(model, step)
        if monitor:
            monitor.on_step(loss=loss)
        run.losses.write(step, loss.item())
        if training.validate_every and step % training.validate_every == 0:
            steps.set_postfix(
                loss=f"{loss.item():.3f}",
                validation=f"{validate(model, run.corpus.validation, training.batch):.3f}",
            )
        if step == training.steps or (training.save_every and step % training.save_every == 0):
            save(run, step, parts)
    if monitor:
        monitor.close()
    return finish(run, validate(model, run.corpus.validation, training.batch))


def make_monitor(
    settings: Settings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> stabmon.AttentionStabilityMonitor | None:
    """Make stabmon's monitor by the settings; None for an unwatched run."""
    watch = settings.stabmon
    if watch is None:
        return None
    sinks = [*load_config(watch.config).sinks, *settings.loggers]
    return stabmon.AttentionStabilityMonitor(
        model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=watch.config,
        log_every=watch.log_every,
        schedule=watch.schedule,
        max_overhead=watch.max_overhead,
        sinks=sinks,
        run_dir=settings.run_dir,
    )


@torch.no_grad()
def validate(model: GPT, blocks: Tensor, batch: int) -> float:
    """Return the mean loss over all ``blocks``; leave the model training."""
    model.eval()
    device = next(model.parameters()).device
    total = math.fsum(
        model.loss(part.to(device)).item() * len(part) for part in blocks.split(batch)
    )
    model.train()
    return total / len(blocks)


def save(run: Run, step: int, parts: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    path = run.folder / "checkpoints" / f"step={step}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path, parts: dict[str, Any], device: torch.device) -> None:
    """Restore every part from a checkpoint; parts missing in it stay new."""
    states = torch.load(path, map_location=device, weights_only=False)
    for name, part in parts.items():
        if name in states:
            part.load_state_dict(states[name])


if __name__ == "__main__":
    sys.exit(main(Settings, train, __doc__))
