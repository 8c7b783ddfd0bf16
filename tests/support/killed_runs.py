"""Runs under guard that may be killed at any moment, and go on from their newest checkpoint.

Three loops train the same tiny model: the Trainer, Lightning and a plain loop, which also runs on
two ranks. W_q and W_k of a layer grow and the learning rate jumps, so that alarms are raised and guard intervenes.
What a step does depends on its number alone, so that a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stabmon
from tests.support.small_runs import BATCH, batches, gpt2

LOOPS = ("trainer", "lightning", "loop", "two ranks")
STATE = "stabmon_state.json"
FINAL = "final"
"""Start of the name of the file of the weights at a run's end."""
WHOLE = "whole"
"""File that marks a checkpoint of the plain loop as complete."""
STEPS, EVERY = 28, 3
"""Optimizer steps of a run, and steps between its checkpoints."""
GROWS_FROM, JUMPS_AT, BREAKS_AT = 5, 10, 24
"""The step from which W_q and W_k grow, and those before which the learning rate jumps and a
weight becomes NaN.
"""
SETTINGS: dict[str, Any] = {
    "log_every": 1,
    "schedule": "fixed",
    "sinks": ["jsonl"],
    "report": False,
}
DATA_SEED = 3


@torch.no_grad()
def disturb(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Let W_q and W_k of a layer grow by a fifth a step, the rate jump, and a weight become NaN."""
    layers = getattr(model, "module", model).transformer.h
    if step >= GROWS_FROM:
        layers[0].attn.c_attn.weight[:, :64].mul_(1.2)
    if step == JUMPS_AT:
        for group in optimizer.param_groups:
            group["lr"] *= 100
    if step == BREAKS_AT:
        layers[1].attn.c_attn.weight[0, 0] = float("nan")


def checkpoints(loop: str, folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first.

    A checkpoint that the framework was writing as it was killed is its own affair, and left out.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        with contextlib.suppress(Exception):
            if loop == "trainer":
                json.loads((path / "trainer_state.json").read_text())
            elif loop == "lightning":
                torch.load(path, weights_only=False)
            elif not (path / WHOLE).is_file():
                continue
            found.append(path)
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    found = re.search(r"checkpoint-(?:step=)?(\d+)", checkpoint.name)
    assert found is not None
    return int(found[1])


def train(
    loop: str,
    folder: str,
    number: int = 0,
    store: str = "",
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train to the end, from the newest checkpoint if there is one.

    Args:
        loop: one of ``LOOPS``.
        folder: the run's folder.
        number: this process's rank.
        store: file by which two ranks meet; ``env://`` under torchrun.
        after_step: called after each step of the plain loop, before its checkpoint.
    """
    path = Path(folder)
    torch.set_num_threads(1)
    handler = logging.FileHandler(path / f"log-{number}.txt")
    handler.setLevel(logging.WARNING)
    logging.getLogger("stabmon").addHandler(handler)
    found = checkpoints(loop, path)
    run = RUNS[loop]
    if run is _train_loop:
        run = functools.partial(_train_loop, after_step=after_step)
    model = run(path, found[-1] if found else None, number, store)
    torch.save(model.state_dict(), path / f"{FINAL}-{number}.pt")
    handler.close()


def _train_loop(
    folder: Path,
    checkpoint: Path | None,
    number: int,
    store: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> nn.Module:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with _group(number, store) as ranks:
        called = DistributedDataParallel(model) if ranks > 1 else model
        monitor = stabmon.AttentionStabilityMonitor(
            called, optimizer, config="guard", run_dir=folder, reduce_ranks=ranks > 1, **SETTINGS
        )
        first = 1
        if checkpoint is not None:
            stored = torch.load(checkpoint / "weights.pt")
            model.load_state_dict(stored["model"])
            optimizer.load_state_dict(stored["optimizer"])
            first = stored["step"] + 1
            monitor.step = stored["step"]
            _load(monitor, checkpoint / (STATE if number == 0 else f"{number}-{STATE}"))
        for step in range(first, STEPS + 1):
            disturb(model, optimizer, step)
            tokens = _tokens(step)[number::ranks]
            loss = called(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.on_step(loss)
            after_step(step)
            if step % EVERY == 0:
                _save(folder, step, number, ranks, model, optimizer, monitor)
        monitor.close()
    return model


def _load(monitor: Any, path: Path) -> None:
    try:
        monitor.load_state_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        logging.getLogger("stabmon").warning("no state to go on from: %s", error)


def _save(
    folder: Path,
    step: int,
    number: int,
    ranks: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monitor: Any,
) -> None:
    """Write a checkpoint, marked whole at its end; none after a rank was lost."""
    if ranks > 1:
        dist.barrier()
    if number != 0:
        return
    path = folder / f"checkpoint-{step}"
    path.mkdir(exist_ok=True)
    state = json.dumps(monitor.state_dict())
    for each in range(ranks):  # every rank reads rank 0's
        (path / (STATE if each == 0 else f"{each}-{STATE}")).write_text(state)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(whole, path / "weights.pt")
    (path / WHOLE).touch()


@contextlib.contextmanager
def _group(number: int, store: str) -> Iterator[int]:
    if not store:
        yield 1
        return
    limit = timedelta(seconds=120 if store == "env://" else 40)
    method = store if store == "env://" else f"file://{store}"
    dist.init_process_group("gloo", init_method=method, rank=number, world_size=2, timeout=limit)
    try:
        yield 2
    finally:
        dist.destroy_process_group()


def _tokens(step: int) -> Tensor:
    return batches(1, rows=BATCH, seed=step)[0]


class _Numbered(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tokens of each step in order, ``BATCH`` rows a step."""

    def __init__(self) -> None:
        self.rows = torch.cat([_tokens(step) for step in range(1, STEPS + 1)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def _train_trainer(folder: Path, checkpoint: Path | None, number: int, store: str) -> nn.Module:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from stabmon.integrations.transformers import StabilityCallback

    class Disturb(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            disturb(kwargs["model"], kwargs["optimizer"], state.global_step + 1)

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_steps=EVERY,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(
        gpt2(),
        arguments,
        train_dataset=_Numbered(),
        callbacks=[Disturb(), StabilityCallback("guard", **SETTINGS)],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model: nn.Module = trainer.model
    return model


def _train_lightning(folder: Path, checkpoint: Path | None, number: int, store: str) -> nn.Module:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from stabmon.integrations.lightning import StabilityCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: Any, index: int) -> Tensor:
            # Lightning begins the data anew where a resume falls into an epoch
            step = self.global_step + 1
            disturb(self.model, self.trainer.optimizers[0], step)
            tokens = _tokens(step)
            loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    saver = ModelCheckpoint(folder, "checkpoint-{step}", every_n_train_steps=EVERY, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver, StabilityCallback("guard", run_dir=folder, **SETTINGS)],
    )
    loader = torch.utils.data.DataLoader(_Numbered(), batch_size=BATCH)
    module = Module()
    trainer.fit(
        module,
        loader,
        ckpt_path=None if checkpoint is None else str(checkpoint),
        weights_only=False,
    )
    return module


RUNS: dict[str, Callable[[Path, Path | None, int, str], nn.Module]] = {
    "trainer": _train_trainer,
    "lightning": _train_lightning,
    "loop": _train_loop,
    "two ranks": _train_loop,
}
