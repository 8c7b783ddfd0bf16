"""Stored runs of a small model: healthy, damaged, guarded, broken, resumed, killed, empty."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stabmon
from stabmon.records import Reading
from stabmon.sinks.jsonl import META, READINGS, JsonlSink
from tests.support.small_runs import batches, gpt2, optimizer_of, train

RATE = 1e-3
HOSTILE = '<img src=x onerror="alert(1)">.attn'
"""A layer's name that must stay text."""


def train_into(
    folder: Path,
    steps: int,
    *,
    between: Callable[[nn.Module, int], None] | None = None,
    config: str = "observe",
    optimizer: bool = True,
    **settings: Any,
) -> Any:
    """Train under a monitor that writes into a folder; give the closed monitor."""
    model = gpt2()
    used = optimizer_of(model, RATE)
    monitor = stabmon.AttentionStabilityMonitor(
        model,
        used if optimizer else None,
        config=config,
        run_dir=folder,
        sinks=["jsonl"],
        **({"log_every": 1} | settings),
    )
    hook = None if between is None else (lambda step: between(model, step))
    train(model, monitor, used, batches(steps), between=hook)
    monitor.close()
    return monitor


@torch.no_grad()
def grow(model: nn.Module, step: int) -> None:
    """Multiply W_q and W_k of every layer from step 15 on."""
    if step >= 15:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.attn.c_attn.weight[:, :64] *= 1.1  # type: ignore[union-attr, index]


@torch.no_grad()
def break_weight(model: nn.Module, step: int) -> None:
    """Put a NaN into a weight before step 8."""
    if step == 8:
        model.transformer.h[1].attn.c_attn.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]


def make_runs(root: Path) -> dict[str, Path]:
    """Make one run of each kind below a folder."""
    folders = {
        name: root / name
        for name in ("healthy", "damaged", "guarded", "broken", "resumed", "killed", "empty")
    }
    train_into(folders["healthy"], 12)
    train_into(folders["damaged"], 60, between=grow)
    train_into(folders["guarded"], 60, between=grow, config="guard")
    train_into(folders["broken"], 12, between=break_weight)
    train_into(folders["empty"], 3, log_every=50, schedule="fixed")
    _resume(folders["resumed"])
    _kill(folders["healthy"], folders["killed"])
    return folders


def _resume(folder: Path) -> None:
    """Train 8 steps, go back to step 4 in a new process's place, and train 8 more."""
    model = gpt2()
    used = optimizer_of(model, RATE)
    options: dict[str, Any] = {"run_dir": folder, "sinks": ["jsonl"], "log_every": 1}
    monitor = stabmon.AttentionStabilityMonitor(model, used, **options)
    train(model, monitor, used, batches(4))
    state = monitor.state_dict()
    train(model, monitor, used, batches(4))
    monitor.close()
    again = stabmon.AttentionStabilityMonitor(model, used, **options)
    again.load_state_dict(state)
    train(model, again, used, batches(8))
    again.close()


def _kill(healthy: Path, folder: Path) -> None:
    """Leave the records as a kill does: no end, a last line cut short, and an hour old."""
    shutil.copytree(healthy, folder)
    records = folder / "stabmon"
    (records / "report.html").unlink()
    meta = json.loads((records / META).read_text())
    del meta["ended"]
    (records / META).write_text(json.dumps(meta))
    lines = (records / READINGS).read_bytes()
    (records / READINGS).write_bytes(lines[:-200])
    before = time.time() - 3700
    for path in records.iterdir():
        os.utime(path, (before, before))


def write_run(
    folder: Path, readings: list[Reading], meta: dict[str, Any] | None = None
) -> JsonlSink:
    """Write readings as the records of a run; give the open sink."""
    (folder / "stabmon").mkdir(parents=True)
    sink = JsonlSink()
    sink.open(folder / "stabmon", meta or {})
    for reading in readings:
        sink.write_reading(reading, {})
    return sink
