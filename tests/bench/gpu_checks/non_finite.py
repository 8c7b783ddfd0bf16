"""Plant NaN and overflows, and see that an issue names where each began."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks.harness import Check, Found, Place
from gpu_checks.models import llama, tokens
from torch import nn

import stabmon

LAYERS, AT, LENGTH = 3, 12, 64


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section."""
    for name, autocast, scaled, plant, layer in (
        ("NaN in a query projection", "bf16", False, nan_weight, "model.layers.1.self_attn.q_proj"),
        ("NaN in an MLP, no autocast", None, False, nan_mlp, "model.layers.2.mlp.up_proj"),
        ("fp16 overflow in an MLP", "fp16", False, large_mlp, "model.layers.1.mlp"),
        ("fp16 overflow under a GradScaler", "fp16", True, large_mlp, "model.layers.1.mlp"),
        ("fp16 overflow of scores", "fp16", False, large_scores, "model.layers.1.self_attn"),
        ("inf in a gradient", "bf16", False, None, "model.layers.1"),
    ):
        yield name, functools.partial(find, place, autocast, scaled, plant, layer)


@torch.no_grad()
def nan_weight(model: Any) -> None:
    """One weight of layer 1's query projection."""
    model.model.layers[1].self_attn.q_proj.weight[3, 5] = float("nan")


@torch.no_grad()
def nan_mlp(model: Any) -> None:
    """One weight of the last layer's MLP."""
    model.model.layers[2].mlp.up_proj.weight[7, 1] = float("nan")


@torch.no_grad()
def large_mlp(model: Any) -> None:
    """Products of layer 1's MLP beyond 65504, which its weights are not."""
    model.model.layers[1].mlp.up_proj.weight.mul_(3e4)
    model.model.layers[1].mlp.gate_proj.weight.mul_(3e4)


@torch.no_grad()
def large_scores(model: Any) -> None:
    """Queries and keys of layer 1 that are themselves inf in float16."""
    model.model.layers[1].self_attn.q_proj.weight.mul_(1e6)


def find(
    place: Place,
    autocast: str | None,
    scaled: bool,
    plant: Callable[[Any], None] | None,
    layer: str,
) -> Found:
    """Train, plant the fault after ``AT`` steps, and read the issues."""
    model = llama(place, width=64 if place.small else 128, layers=LAYERS, length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = torch.amp.GradScaler(place.device.type, enabled=scaled)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(autocast or "")
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, config="observe", log_every=10, sinks=[]
    )
    steps = AT + (45 if scaled else 6)
    for step in range(1, steps + 1):
        batch = tokens(place, 4, LENGTH, seed=step)
        optimizer.zero_grad()
        with torch.autocast(place.device.type, dtype, enabled=dtype is not None):
            loss = model(input_ids=batch, labels=batch).loss
        scaler.scale(loss).backward()
        if plant is None and step == AT:
            gradient = model.model.layers[1].self_attn.v_proj.weight.grad
            gradient[0, 0] = float("inf")
        if not scaled:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        monitor.on_step(loss=loss)
        if plant is not None and step == AT:
            plant(model)
    issues = [issue for issue in monitor.issues if issue.issue_type == "non_finite"]
    errors = dict(monitor.errors)
    monitor.close()
    named = [issue for issue in issues if (issue.layer or "").startswith(layer)]
    words = (
        "; ".join(
            f"step {i.step} {i.severity} {i.layer}: {dict(i.evidence)}"[:150] for i in issues[:3]
        )
        or "no issue"
    )
    words += f"; failed inside: {errors}" if errors else ""
    figures = {"issues": [issue.to_dict() for issue in issues], "errors": errors}
    return Found(bool(named) and not errors, words, figures)
