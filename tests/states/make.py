"""Make the checkpoints of a run under guard that later versions must resume.

    python tests/states/make.py OUT

writes ``OUT/transformers`` (the Trainer's checkpoint folder) and ``OUT/lightning.ckpt``. Both hold
the same run of a small GPT-2: at step 8 the queries and keys of the first layer jump, which guard
clips; after step 12 a person applies three interventions; at step 16 the learning rate jumps, which
guard caps; after step 17 the checkpoint is written, with six interventions held and issues open.
``transformers_1`` and ``lightning_1.ckpt`` are what version 1 wrote. A new state schema gets a new
pair; the old ones stay.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from stabmon.config.load import load_config
from stabmon.integrations.lightning import StabilityCallback as LightningCallback
from stabmon.integrations.transformers import StabilityCallback as TransformersCallback
from stabmon.interventions import INTERVENTIONS

FAULT, BY_HAND, JUMP, SAVED = 8, 12, 16, 17
"""Steps: the weights jump, a person acts, the rate jumps, the checkpoint is written."""
RATE, FACTOR, TEMPERATURE = 0.05, 0.5, 2.0
"""The learning rate, what a person multiplies it by and what scores are divided by."""
WIDTH, LENGTH, VOCABULARY = 16, 48, 32
HELD = {
    "skip_step": 0,
    "qk_clip": FAULT + 1,
    "cap_query_key_norm": BY_HAND,
    "soften_logits": BY_HAND,
    "lower_learning_rate": BY_HAND,
    "cap_learning_rate": JUMP,
}
"""Every intervention that is held when the checkpoint is written -> the step of its application."""
KEPT = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "stabmon_state.json",
    "trainer_state.json",
)
"""Files of a checkpoint that resuming reads; the rest are settings and random states."""


class Tokens(Dataset[dict[str, Tensor]]):
    """Random tokens, the same at each index, in rows long enough to judge entropies."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(3, VOCABULARY, (256, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Hooks:
    """Actions at three points of a step, counted from 1; a run calls them in either framework."""

    def resumed(self, stability: Any, model: Any) -> None:
        """Look at a run that begins or goes on."""

    def before_optimizer(self, step: int, model: Any) -> None:
        """Act on gradients, after stabmon has seen them."""

    def after_optimizer(self, step: int, model: Any) -> None:
        """Act on weights, before stabmon looks at the step."""

    def after_step(self, step: int, model: Any, stability: Any) -> None:
        """Act on a step that stabmon has judged."""

    def rate(self, step: int) -> float:
        """Return the scheduled learning rate of a step, as a multiple of ``RATE``."""
        return 1.0


class Provoked(Hooks):
    """The run whose checkpoint is kept."""

    def after_optimizer(self, step: int, model: Any) -> None:
        if step == FAULT:
            query_key(model, 0).mul_(60.0)

    def after_step(self, step: int, model: Any, stability: Any) -> None:
        if step == BY_HAND:
            grew = next(each for each in stability.issues if each.issue_type == "logit_growth")
            other = dataclasses.replace(grew, layer=grew.layer.replace("0", "1"))
            for name, settings in {
                "cap_query_key_norm": {"times": 1.0},
                "soften_logits": {"temperature": TEMPERATURE},
                "lower_learning_rate": {"factor": FACTOR},
            }.items():
                stability.monitor.apply(INTERVENTIONS[name](**settings).aimed_at([other]))

    def rate(self, step: int) -> float:
        return 400.0 if step >= JUMP else 1.0


def make_model() -> Any:
    """Build GPT-2 with two layers of two heads, always with the same weights."""
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    config = GPT2Config(**sizes, **tokens, **dropout, use_cache=False, loss_type="ForCausalLM")
    return GPT2LMHeadModel(config).train()


def query_key(model: nn.Module, layer: int) -> Tensor:
    """Return the weights that make a layer's queries and keys, ``[WIDTH, 2 WIDTH]``."""
    weight = model.get_submodule(f"transformer.h.{layer}.attn.c_attn").weight
    return weight.detach()[:, : 2 * WIDTH]


def optimizer_of(model: nn.Module, hooks: Hooks) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Make SGD, whose step is the rate times the gradient, with the scheduled rates of a run."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    return optimizer, LambdaLR(optimizer, lambda made: hooks.rate(made + 1))


def callback_of(cls: Callable[..., Any], folder: Path) -> Any:
    """Make the stability callback of a run, in which a clip of all heads lowers no rate."""
    guard = {**load_config("guard").interventions, "qk_clip": {"heads": "all", "model_share": None}}
    return cls(
        "guard",
        log_every=1,
        sinks=["jsonl"],
        run_dir=folder,
        budget={"hold": 50},
        interventions=guard,
    )


class _Calls(TrainerCallback):
    """Call the hooks of a run in the Trainer."""

    def __init__(self, hooks: Hooks, stability: Any) -> None:
        self.hooks, self.stability = hooks, stability

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.hooks.resumed(self.stability, given["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.hooks.before_optimizer(state.global_step + 1, given["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.hooks.after_optimizer(state.global_step + 1, given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.hooks.after_step(state.global_step, given["model"], self.stability)


def train_transformers(folder: Path, hooks: Hooks, steps: int, resume: Path | None = None) -> Any:
    """Train in the Trainer; save after ``SAVED`` steps into ``folder/checkpoint-17``."""
    stability, model = callback_of(TransformersCallback, folder), make_model()
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="steps",
        save_steps=SAVED,
        seed=0,
        max_steps=steps,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Tokens(),
        callbacks=[stability, _Calls(hooks, stability)],
        optimizers=optimizer_of(model, hooks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return stability


class _Module(pl.LightningModule):
    """The same run in Lightning."""

    def __init__(self, hooks: Hooks, stability: Any) -> None:
        super().__init__()
        self.model, self.hooks, self.stability = make_model(), hooks, stability

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step + 1
        super().optimizer_step(*args, **kwargs)
        self.hooks.after_optimizer(step, self.model)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = optimizer_of(self, self.hooks)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class _LightningCalls(pl.Callback):
    """Call the hooks of a run in Lightning, and save it."""

    def __init__(self, saved: Path) -> None:
        self.saved = saved

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.hooks.resumed(pl_module.stability, pl_module.model)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        pl_module.hooks.before_optimizer(trainer.global_step + 1, pl_module.model)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        pl_module.hooks.after_step(step, pl_module.model, pl_module.stability)
        if step == SAVED:
            trainer.save_checkpoint(self.saved)


def train_lightning(folder: Path, hooks: Hooks, steps: int, resume: Path | None = None) -> Any:
    """Train in Lightning; save after ``SAVED`` steps into ``folder/saved.ckpt``."""
    stability = callback_of(LightningCallback, folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[stability, _LightningCalls(folder / "saved.ckpt")],
    )
    module = _Module(hooks, stability)
    trainer.fit(module, DataLoader(Tokens(), 4), ckpt_path=resume, weights_only=True)
    return stability


TRAIN = {"transformers": train_transformers, "lightning": train_lightning}


def make(out: Path) -> dict[str, Path]:
    """Write the checkpoints of both frameworks into a folder; return where each lies."""
    found = {"transformers": out / "transformers", "lightning": out / "lightning.ckpt"}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for framework, train in TRAIN.items():
            stability = train(Path(scratch) / framework, Provoked(), SAVED)
            held = {each.intervention.name: each.step for each in stability.monitor.applied}
            if held != HELD:
                raise RuntimeError(f"{framework}: {held} are held, expected {HELD}")
        found["transformers"].mkdir(exist_ok=True)
        for name in KEPT:
            saved = Path(scratch) / "transformers" / f"checkpoint-{SAVED}" / name
            shutil.copy(saved, found["transformers"] / name)
        shutil.copy(Path(scratch) / "lightning" / "saved.ckpt", found["lightning"])
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for path in make(Path(sys.argv[1])).values():
        print(path)
