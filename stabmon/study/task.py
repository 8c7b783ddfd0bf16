"""One task of a study: train, save the weights, record the result."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stabmon.controllers import ControllerWatch, save_controllers
from stabmon.controllers.attach import find_controllers
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.study.fit import MonitorFactory, fit
from stabmon.study.pictures import draw
from stabmon.study.plan import StudySettings, Task
from stabmon.study.variants import BASE, apply_variant
from stabmon.tiny.corpus import load_corpus
from stabmon.tiny.language_models import make_model

EVERY = 2.0
"""Seconds between two words on the state of a training."""


def run_task(
    settings: StudySettings, task: Task, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run one task: train, write the weights, then the result.

    Args:
        settings: the study.
        task: the training.
        say: called every few seconds with the state of the training in words.

    Returns:
        The result, as written to ``results/<task>.json``.
    """
    folder = Path(settings.run_dir)
    corpus = load_corpus(**dataclasses.asdict(settings.corpus))
    torch.manual_seed(task.seed)
    model = make_model(settings.model, settings.corpus.block)
    limits = {"bias_max": settings.bias_max, "gain_max": settings.gain_max}
    base_file = folder / "weights" / f"base-{task.seed}.pt"
    if task.kind == "frozen":
        model.load_state_dict(torch.load(base_file, weights_only=True))
    added = apply_variant(model, task.variant, limits)
    parameters = added if task.kind == "frozen" else list(model.parameters())
    phase = settings.controllers if task.kind == "frozen" else settings.base
    first = bool(parameters) and task.seed == settings.seeds[0]
    with record_controllers(
        model, folder / "series" / task.name, settings.watch_every if first else None
    ):
        monitored = monitor_factory(settings, task, model)
        on_step = now_and_then(f"{task.name}: step {{}} of {phase.steps}, loss {{:.4f}}", say)
        fitted = fit(model, parameters, corpus, phase, task.seed, monitored, on_step)
    if task.variant == BASE:
        base_file.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), base_file.with_suffix(".tmp"))
        base_file.with_suffix(".tmp").replace(base_file)
    save_task_controllers(model, folder / "controllers" / task.name, task)
    result = (
        dataclasses.asdict(task)
        | dataclasses.asdict(fitted)
        | {"added_parameters": sum(each.numel() for each in added)}
    )
    path = folder / "results" / f"{task.name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(result) + "\n")
    path.with_suffix(".tmp").replace(path)
    return result


def now_and_then(words: str, say: Callable[[str], None]) -> Callable[[int, torch.Tensor], None]:
    """Return a function of step and loss that says them at once, then every few seconds.

    Args:
        words: text with places for step and loss.
        say: gets the text.
    """
    due = 0.0

    def on_step(step: int, loss: torch.Tensor) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + EVERY
            say(words.format(step, loss.item()))

    return on_step


def monitor_factory(
    settings: StudySettings, task: Task, model: torch.nn.Module
) -> MonitorFactory | None:
    """Return the factory of a task's monitor; None for an unwatched task."""
    watch = settings.stabmon
    if watch is None or task.kind != "joint" or task.seed != settings.seeds[0]:
        return None
    folder = Path(settings.run_dir) / "watched" / task.name
    return lambda optimizer, schedule: AttentionStabilityMonitor(
        model,
        optimizer,
        schedule,
        config=watch.config,
        log_every=watch.log_every,
        schedule=watch.schedule,
        max_overhead=watch.max_overhead,
        sinks=["jsonl"],
        run_dir=folder,
    )


@contextmanager
def record_controllers(model: torch.nn.Module, folder: Path, every: int | None) -> Iterator[None]:
    """Record time series and pictures of a model's controllers in training.

    Nothing is recorded where ``every`` is None or there are no controllers.
    """
    if every is None or not find_controllers(model):
        yield
        return
    with ControllerWatch(model, every=every, training_only=True, run_dir=folder) as watch:
        yield
    draw(watch, folder)


def save_task_controllers(model: torch.nn.Module, folder: Path, task: Task) -> None:
    """Save the controllers of a variant; beside them the base of a joint training.

    They are worth nothing without that base.
    """
    if not find_controllers(model):
        return
    save_controllers(model, folder)
    if task.kind == "joint":
        torch.save(
            {name: value for name, value in model.state_dict().items() if "stabmon" not in name},
            folder / "base.pt",
        )
