"""Settings of the training scripts, read by :func:`stabmon.config.read_settings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from inject_fault import HighLr, ScaleQk

from stabmon.config import SettingsError, read_settings
from stabmon.study.settings import CorpusSettings, TrainingSettings, WatchSettings

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
    """Settings that all training scripts share; each adds the ``model`` that it builds."""

    run_dir: str
    """Folder of the run's records and checkpoints."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    resume: bool = False
    """Go on from the run's last checkpoint."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    provoke: Literal["none", "high_lr", "scale_qk"] = "none"
    """Real failure of attention to bring about; ``high_lr`` and ``scale_qk`` hold its settings."""
    high_lr: HighLr = field(default_factory=HighLr)
    scale_qk: ScaleQk = field(default_factory=ScaleQk)
    stabmon: WatchSettings | None = field(default_factory=WatchSettings)
    """Settings of the monitor; None to train unwatched."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """The framework's own loggers; in a plain loop, stabmon's sinks of these names."""
