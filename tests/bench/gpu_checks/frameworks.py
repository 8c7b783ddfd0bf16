"""Run the callbacks of both frameworks on this device, from the first step to their records."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tests.bench.gpu_checks.harness import Check, Found, Place, Skipped
from tests.bench.gpu_checks.models import gpt2, llama, tokens

STEPS, EVERY, BATCH, LENGTH = 24, 5, 4, 64


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random tokens and their labels, on the CPU as data loaders give them."""

    def __init__(self, place: Place) -> None:
        self.tokens = tokens(
            Place(torch.device("cpu"), place.small, place.deadline), BATCH * STEPS * 2, LENGTH
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section."""
    for precision in ("bf16", "fp16"):
        yield (
            f"Hugging Face Trainer, {precision}",
            functools.partial(hugging_face, place, precision),
        )
        yield f"Lightning, {precision}-mixed", functools.partial(lightning, place, precision)
    yield (
        "Hugging Face Trainer, resumed from a checkpoint",
        functools.partial(hugging_face_resumed, place),
    )
    yield "Lightning, resumed from a checkpoint", functools.partial(lightning_resumed, place)


def need(*packages: str) -> None:
    """Skip the check where a package is missing.

    Raises:
        Skipped: naming it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")


def records_of(folder: Path) -> Any:
    """What a run left on disk."""
    import stabmon

    if hasattr(stabmon, "read_records"):
        return stabmon.read_records(folder)
    from stabmon.sinks.reader import read_records

    return read_records(folder)


def judged(callback: Any, folder: Path, steps: int, words: str = "") -> Found:
    """Whether every sampled step is in the records and nothing failed inside."""
    records = records_of(folder)
    seen = [reading.step for reading in records.readings]
    wanted = list(range(EVERY, steps + 1, EVERY))
    layers = {len(reading.layers) for reading in records.readings}
    errors = dict(callback.monitor.errors)
    losses = [reading.loss for reading in records.readings]
    words = (
        f"readings of steps {seen}, layers {sorted(layers)}, issues {len(records.issues)}{words}"
    )
    words += f"; failed inside: {errors}" if errors else ""
    good = set(wanted) <= set(seen) and layers == {2} and not errors and None not in losses
    return Found(good, words, {"steps": seen, "errors": errors, "losses": losses})


def reports() -> list[str]:
    """TensorBoard where it is installed."""
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def trainer_of(place: Place, folder: str, precision: str, steps: int, callback: Any) -> Any:
    """A Hugging Face Trainer."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    arguments = TrainingArguments(
        folder,
        use_cpu=not place.is_cuda,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        report_to=reports(),
        save_strategy="steps",
        save_steps=STEPS // 2,
        logging_steps=5,
        disable_tqdm=True,
        bf16=precision == "bf16",
        fp16=precision == "fp16" and place.is_cuda,
        seed=0,
    )
    model = gpt2(place, width=128, layers=2, length=LENGTH)
    trainer = Trainer(model, arguments, train_dataset=Rows(place), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer


def hugging_face(place: Place, precision: str) -> Found:
    """Train a few steps under guard."""
    need("accelerate")
    from stabmon.integrations.transformers import StabilityCallback

    if precision == "fp16":
        place.need_cuda("the Trainer has fp16 on accelerators only")
    with tempfile.TemporaryDirectory() as folder:
        callback = StabilityCallback("guard", log_every=EVERY, schedule="fixed")
        trainer = trainer_of(place, folder, precision, STEPS, callback)
        trainer.train()
        logged = [
            row
            for row in trainer.state.log_history
            if any(key.startswith("attention/") for key in row)
        ]
        return judged(callback, Path(folder), STEPS, f", {len(logged)} rows of scalars in the log")


def hugging_face_resumed(place: Place) -> Found:
    """Stop half-way and go on from the checkpoint with a new callback."""
    need("accelerate")
    from stabmon.integrations.transformers import StabilityCallback

    with tempfile.TemporaryDirectory() as folder:
        trainer_of(
            place,
            folder,
            "bf16",
            STEPS // 2,
            StabilityCallback("guard", log_every=EVERY, schedule="fixed"),
        ).train()
        callback = StabilityCallback("guard", log_every=EVERY, schedule="fixed")
        trainer_of(place, folder, "bf16", STEPS, callback).train(resume_from_checkpoint=True)
        return judged(callback, Path(folder), STEPS, f", monitor at step {callback.monitor.step}")


def module_of(place: Place) -> Any:
    """The model in Lightning."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(
                Place(torch.device("cpu"), place.small, place.deadline),
                width=128,
                layers=2,
                length=LENGTH,
            )

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    return Module()


def fit(
    place: Place,
    folder: str,
    precision: str,
    steps: int,
    callback: Any,
    checkpoint: str | None = None,
) -> Any:
    """Lightning's Trainer, after its training."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    logger = TensorBoardLogger(folder) if reports() else CSVLogger(folder)
    trainer = pl.Trainer(
        accelerator="gpu" if place.is_cuda else "cpu",
        devices=1,
        max_steps=steps,
        precision=f"{precision}-mixed" if precision == "bf16" else "16-mixed",
        gradient_clip_val=1.0,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
        log_every_n_steps=5,
    )
    trainer.fit(module_of(place), DataLoader(Rows(place), BATCH), ckpt_path=checkpoint)
    return trainer


def lightning(place: Place, precision: str) -> Found:
    """Train a few steps under guard."""
    need("lightning")
    from stabmon.integrations.lightning import StabilityCallback

    if precision == "fp16":
        place.need_cuda("Lightning has 16-mixed on accelerators only")
    with tempfile.TemporaryDirectory() as folder:
        callback = StabilityCallback("guard", log_every=EVERY, schedule="fixed", run_dir=folder)
        fit(place, folder, precision, STEPS, callback)
        return judged(callback, Path(folder), STEPS)


def lightning_resumed(place: Place) -> Found:
    """Stop half-way and go on from the checkpoint with a new callback."""
    need("lightning")
    from stabmon.integrations.lightning import StabilityCallback

    with tempfile.TemporaryDirectory() as folder:
        first = fit(
            place,
            folder,
            "bf16",
            STEPS // 2,
            StabilityCallback("guard", log_every=EVERY, schedule="fixed", run_dir=folder),
        )
        path = str(Path(folder) / "half.ckpt")
        first.save_checkpoint(path)
        callback = StabilityCallback("guard", log_every=EVERY, schedule="fixed", run_dir=folder)
        fit(place, folder, "bf16", STEPS, callback, path)
        return judged(callback, Path(folder), STEPS, f", monitor at step {callback.monitor.step}")
