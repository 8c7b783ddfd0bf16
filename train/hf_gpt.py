"""Train a small Llama or GPT-2 with the Hugging Face Trainer, monitored.

python train/hf_gpt.py configs/train_hf_gpt.yaml run_dir=runs/hf
python train/hf_gpt.py configs/train_hf_gpt.yaml run_dir=runs/hf resume=true training.steps=800
python train/hf_gpt.py configs/train_hf_gpt.yaml run_dir=runs/hf-provoked provoke=scale_qk
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from inject_fault import ScaleQk
from losses import LossLog
from run import Outcome, finish, main, start
from settings import RunSettings
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from stabmon.tiny.language_models import Shape, make_model
from stabmon.tiny.recipe import BETAS, MIN_RATE


@dataclass(frozen=True)
class Settings(RunSettings):
    """Settings of the script; ``loggers`` go to the Trainer's ``report_to``."""

    model: Shape = field(default_factory=Shape)


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks in the Trainer's form, in the given order ``[n]``."""

    def __init__(self, blocks: Tensor, order: Tensor) -> None:
        self.blocks = blocks
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[self.order[index]]
        return {"input_ids": block, "labels": block}


class LoggedTrainer(Trainer):
    """Trainer with a log of every step's exact loss.

    The Trainer's own log averages and comes later.
    """

    def __init__(self, losses: LossLog, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses = losses

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.write(self.state.global_step + 1, loss.item())
        return loss


class ScaleQkCallback(TrainerCallback):
    """Applies ``scale_qk`` right after the optimizer's step."""

    def __init__(self, scale_qk: ScaleQk) -> None:
        self.scale_qk = scale_qk

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scale_qk.apply(kwargs["model"], state.global_step + 1)


def train(settings: Settings) -> Outcome:
    """Train by the settings; return the outcome."""
    run = start(settings, "checkpoint-*")
    set_seed(settings.seed)
    trainer = LoggedTrainer(
        run.losses,
        model=make_model(settings.model, settings.corpus.block),
        args=make_arguments(settings),
        train_dataset=Blocks(run.corpus.train, run.stream.flatten()),
        eval_dataset=Blocks(run.corpus.validation, torch.arange(len(run.corpus.validation))),
        callbacks=make_callbacks(settings),
    )
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    return finish(run, trainer.evaluate()["eval_loss"])


def make_arguments(settings: Settings) -> TrainingArguments:
    """Translate the settings into the Trainer's arguments."""
    training = settings.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = f"{settings.run_dir}/tensorboard"
    os.environ.setdefault("WANDB_DIR", settings.run_dir)
    os.environ.setdefault("WANDB_PROJECT", "stabmon")
    return TrainingArguments(
        output_dir=settings.run_dir,
        run_name=settings.run_dir,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        per_device_eval_batch_size=training.batch,
        learning_rate=training.learning_rate
        * (settings.high_lr.factor if settings.provoke == "high_lr" else 1.0),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": MIN_RATE},
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=training.clip,
        # the stream is shuffled already; so resumed and paired runs see the same batches
        train_sampling_strategy="sequential",
        eval_strategy="steps" if training.validate_every else "no",
        eval_steps=training.validate_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=training.save_every or training.steps,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=list(settings.loggers) or "none",
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
    )


def make_callbacks(settings: Settings) -> list[TrainerCallback]:
    """Make the callbacks: the fault, if one is asked for, and the monitor."""
    callbacks: list[TrainerCallback] = []
    if settings.provoke == "scale_qk":
        callbacks.append(ScaleQkCallback(settings.scale_qk))
    if settings.stabmon is not None:
        from stabmon.integrations.transformers import StabilityCallback

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
    return callbacks


if __name__ == "__main__":
    sys.exit(main(Settings, train, __doc__))
