"""Describe a run in ``meta.json``: versions, configuration, model, schedule."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from stabmon.config import StabilityConfig
from stabmon.sinks.jsonl import utc_now


def run_meta(
    model: nn.Module,
    config: StabilityConfig,
    framework: str,
    continues: bool,
    first_step: int = 1,
) -> dict[str, Any]:
    """Return the metadata of a run as plain values, for JSON.

    Args:
        model: the model that trains.
        config: the run's configuration.
        framework: ``transformers``, ``lightning`` or ``loop``.
        continues: the run goes on from an earlier one.
        first_step: the first step of this start.
    """
    packages = {}
    for name in ("stabmon", "torch", "transformers", "lightning", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    return {
        "versions": {"python": platform.python_version(), **packages},
        "framework": framework,
        "config": config.to_dict(),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable": sum(
                parameter.numel() for parameter in parameters if parameter.requires_grad
            ),
        },
        "sampling": {
            "schedule": config.schedule,
            "every": config.log_every,
            "unit": "optimizer step",
            "first": config.log_every if config.schedule == "fixed" else 1,
            "max_overhead": config.max_overhead if config.schedule == "adaptive" else None,
        },
        "continues": continues,
        "started": utc_now(),
        "first_step": first_step,
    }
