"""Fixtures for the training scripts: on the path, and small.

The scripts lie in a folder, not in a package.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "train"))

TINY = (
    "model.layers=2",
    "model.heads=2",
    "model.width=16",
    "corpus.block=32",
    "training.batch=2",
    "training.steps=6",
    "training.warmup=2",
    "training.validate_every=null",
    "training.save_every=null",
    "training.threads=1",
    "stabmon=null",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a text of 40 blocks of 32 bytes."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 5)
    return path


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Callable[..., dict[int, float]]:
    """Train with one of the scripts in a folder of its own; return loss by step.

    Tiny and unwatched by default.
    """

    def train(script: str, folder: str, *overrides: str) -> dict[int, float]:
        from losses import read_losses
        from settings import read_settings

        module: Any = importlib.import_module(script)
        common = (f"run_dir={tmp_path / folder}", f"corpus.text={text}", *TINY, *overrides)
        threads = torch.get_num_threads()
        with mock.patch.dict(os.environ):  # the scripts tell the loggers where to write
            module.train(
                read_settings(module.Settings, ROOT / "configs" / f"train_{script}.yaml", common)
            )
        torch.set_num_threads(threads)
        return read_losses(tmp_path / folder / "losses.jsonl")

    return train
