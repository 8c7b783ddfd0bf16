"""Settings that the study and the training scripts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stabmon._settings import Bounds, Count, NonNegative, Positive, SettingsError, read_settings

__all__ = [
    "CorpusSettings",
    "SettingsError",
    "TrainingSettings",
    "WatchSettings",
    "read_settings",
]


@dataclass(frozen=True)
class CorpusSettings:
    """Text to learn; see :func:`stabmon.tiny.corpus.load_corpus`."""

    text: str | None = None
    """A file; None for Python's own help topics."""
    block: Annotated[int, Bounds(2)] = 128
    """Bytes per block."""
    validation_share: Annotated[float, Bounds(above=0, below=1)] = 0.1
    """Share of the blocks that is held out."""
    seed: int = 0
    """Seed of the choice of blocks."""


@dataclass(frozen=True)
class TrainingSettings:
    """Length and speed of a training.

    AdamW with betas 0.9 and 0.95; linear warm-up, then a cosine down to a tenth of the rate.
    """

    steps: Count = 400
    """Optimizer steps."""
    batch: Count = 8
    """Blocks per step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    warmup: Annotated[int, Bounds(0)] = 20
    """Steps over which the rate rises."""
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0
    """Largest global norm of the gradient."""
    validate_every: Count | None = None
    """Steps between validations; None for one at the end alone."""
    save_every: Count | None = None
    """Steps between checkpoints; None for one at the end alone."""
    threads: Count | None = None
    """CPU threads; None for PyTorch's choice. Losses are compared bit for bit only at the same
    number.
    """


@dataclass(frozen=True)
class WatchSettings:
    """Settings handed to the monitor; ``config`` may name a file with all others."""

    config: str = "observe"
    """A preset, or a YAML file."""
    log_every: Count = 10
    """Sample every N-th optimizer step of a quiet run."""
    schedule: Literal["adaptive", "fixed"] | None = None
    """Steps to sample: adaptive for more while something moves, fixed for no others; null for that
    of ``config``.
    """
    max_overhead: Annotated[float, Bounds(above=0, high=1)] | None = None
    """Most of the run's time that sampled steps of an adaptive schedule may take; null for that of
    ``config``.
    """
