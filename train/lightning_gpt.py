r"""Train a small GPT with Lightning's Trainer, monitored.

python train/lightning_gpt.py configs/train_lightning_gpt.yaml run_dir=runs/lightning
python train/lightning_gpt.py configs/train_lightning_gpt.yaml run_dir=runs/lightning \
    resume=true training.steps=800
python train/lightning_gpt.py configs/train_lightning_gpt.yaml run_dir=runs/lightning-provoked \
    provoke=scale_qk
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from gpt import GPT, GPTShape
from inject_fault import ScaleQk
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from losses import LossLog
from run import Outcome, Run, finish, main, start
from settings import RunSettings, SettingsError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stabmon.study.optimizer import make_optimizer, make_schedule


@dataclass(frozen=True)
class Settings(RunSettings):
    """Settings of the script; ``loggers`` are Lightning's."""

    model: GPTShape = field(default_factory=GPTShape)


class Blocks(Dataset[Tensor]):
    """Blocks of bytes, ``[N, S]``."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks[index]


class StreamSampler(Sampler[list[int]]):
    """The blocks of each remaining step.

    A resumed run starts at its step; the length is that of the whole run, as Lightning counts.
    """

    def __init__(self, stream: Tensor, done: int) -> None:
        self.stream = stream
        self.done = done

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.stream[self.done :].tolist()


class GPTModule(L.LightningModule):
    """The model, its loss and its optimizer."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.gpt = GPT(settings.model)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss = self.gpt.loss(tokens)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens: Tensor, index: int) -> None:
        self.log("validation/loss", self.gpt.loss(tokens), batch_size=len(tokens), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        factor = self.settings.high_lr.factor if self.settings.provoke == "high_lr" else 1.0
        optimizer = make_optimizer(self.gpt, self.settings.training, factor)
        schedule = make_schedule(optimizer, self.settings.training)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LossCallback(L.Callback):
    """Logs every step's exact loss."""

    def __init__(self, losses: LossLog) -> None:
        self.losses = losses

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *batch: Any
    ) -> None:
        self.losses.write(trainer.global_step, outputs["loss"].item())


class ScaleQkCallback(L.Callback):
    """Applies ``scale_qk`` right after the optimizer's step."""

    def __init__(self, scale_qk: ScaleQk) -> None:
        self.scale_qk = scale_qk

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any
    ) -> None:
        self.scale_qk.apply(pl_module, trainer.global_step)


def train(settings: Settings) -> Outcome:
    """Train by the settings; return the outcome."""
    run = start(settings, "checkpoints/step=*.ckpt")
    training = settings.training
    L.seed_everything(settings.seed, verbose=False)
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers"
    )  # the blocks lie in memory
    warnings.filterwarnings(
        "ignore", message=".*your dataloader is not resumable"
    )  # StreamSampler goes on where the run was
    module = GPTModule(settings)
    trainer = L.Trainer(
        max_steps=training.steps,
        accelerator="auto",
        devices=1,
        gradient_clip_val=training.clip,
        logger=make_loggers(settings),
        callbacks=make_callbacks(settings, run),
        val_check_interval=training.validate_every,
        check_val_every_n_epoch=None,
        limit_val_batches=None if training.validate_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        default_root_dir=settings.run_dir,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    stream = DataLoader(Blocks(run.corpus.train), batch_sampler=StreamSampler(run.stream, run.done))
    held_out = DataLoader(Blocks(run.corpus.validation), batch_size=training.batch)
    trainer.fit(module, stream, held_out, ckpt_path=run.checkpoint, weights_only=False)
    last = run.folder / "checkpoints" / f"step={trainer.global_step}.ckpt"
    if not last.exists():
        trainer.save_checkpoint(last)
    trainer.limit_val_batches = 1.0
    return finish(run, trainer.validate(module, held_out, verbose=False)[0]["validation/loss"])


def make_loggers(settings: Settings) -> list[Logger]:
    """Make Lightning's loggers of the names in the settings.

    Raises:
        SettingsError: for a name other than tensorboard and wandb.
    """
    folder = settings.run_dir
    known: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(folder, name="tensorboard", version=""),
        "wandb": lambda: WandbLogger(
            project="stabmon",
            name=folder,
            save_dir=folder,
            offline=os.environ.get("WANDB_MODE") == "offline",
        ),
    }
    for name in settings.loggers:
        if name not in known:
            raise SettingsError(f"loggers names {name!r}, but known are {', '.join(known)}")
    return [known[name]() for name in settings.loggers]


def make_callbacks(settings: Settings, run: Run) -> list[L.Callback]:
    """Make the callbacks: loss log, fault, monitor and checkpoints."""
    callbacks: list[L.Callback] = [LossCallback(run.losses)]
    if settings.provoke == "scale_qk":
        callbacks.append(ScaleQkCallback(settings.scale_qk))
    if settings.stabmon is not None:
        from stabmon.integrations.lightning import StabilityCallback

        watch = settings.stabmon
        callbacks.append(
            StabilityCallback(
                watch.config,
                log_every=watch.log_every,
                schedule=watch.schedule,
                max_overhead=watch.max_overhead,
                run_dir=settings.run_dir,
            )
        )
    every = settings.training.save_every or settings.training.steps
    return [
        *callbacks,
        ModelCheckpoint(
            dirpath=run.folder / "checkpoints",
            filename="{step}",
            every_n_train_steps=every,
            save_top_k=-1,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main(Settings, train, __doc__))
