"""What the training scripts are told; how it is read is :mod:`stabmon.study.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from inject_fault import HighLr, ScaleQk

from stabmon.study.settings import (
    CorpusSettings,
    SettingsError,
    TrainingSettings,
    WatchSettings,
    read_settings,
)

__all__ = [
    "CorpusSettings",
    "RunSettings",
    "SettingsError",
    "TrainingSettings",
    "WatchSettings",
    "read_settings",
]


@dataclass(frozen=True)
class RunSettings:
    """What all training scripts share; each adds the ``model`` that it builds."""

    run_dir: str
    seed: int = 0
    """Of the weights and of the order of the data."""
    resume: bool = False
    """Go on from the run's last checkpoint."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    provoke: Literal["none", "high_lr", "scale_qk"] = "none"
    """Which real failure of attention to bring about; ``high_lr`` and ``scale_qk`` say how."""
    high_lr: HighLr = field(default_factory=HighLr)
    scale_qk: ScaleQk = field(default_factory=ScaleQk)
    stabmon: WatchSettings | None = field(default_factory=WatchSettings)
    """None to train unwatched."""
    loggers: list[str] = field(default_factory=list)
    """``tensorboard`` and ``wandb``: the framework's own loggers; in a plain loop, stabmon's sinks
    of these names.
    """
