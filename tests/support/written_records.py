"""Stored runs of any size, written by the sink itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.jsonl import JsonlSink


def opened(folder: Path, *, continues: bool = False) -> JsonlSink:
    """A sink that is open on a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    sink = JsonlSink()
    sink.open(folder, {"continues": continues, "sampling": {"first": 10}})
    return sink


def wide_reading(step: int, layers: int = 4, heads: int = 4, loss: float | None = None) -> Reading:
    """A reading whose entropy falls with the step in the first layer alone."""
    rng = np.random.default_rng(step)
    values = {
        f"h.{layer}.attn": {
            "normalized_entropy": np.full(heads, 1 / step if layer == 0 else 0.9),
            "max_logit": rng.random(heads),
        }
        for layer in range(layers)
    }
    return Reading(step, 10 / step if loss is None else loss, values, learning_rate=1e-3)


def collapse(step: int, layer: int | str = 0, head: int = 1, **changes: object) -> StabilityIssue:
    """An entropy collapse of one head, an alarm."""
    values: dict[str, object] = {
        "step": step,
        "layer": f"h.{layer}.attn" if isinstance(layer, int) else layer,
        "head": head,
        "issue_type": "entropy_collapse",
        "severity": "error",
        "value": 0.03,
        "threshold": 0.1,
        "suggestion": "Lower the learning rate.",
        "eta_steps": 230.0,
    }
    return StabilityIssue(**(values | changes))  # type: ignore[arg-type]


def store(folder: Path, steps: Iterable[int], **size: int) -> JsonlSink:
    """Write readings, and return the sink that is still open."""
    sink = opened(folder)
    for step in steps:
        sink.write_reading(wide_reading(step, **size), {})
    return sink
