"""Train with and without a monitor; find any bit that differs or is left behind.

python tests/bench/bitwise_neutrality.py [--steps 200] [--only TEXT]

Every row trains the same small model from the same seed, unwatched and watched with ``observe``, on
one thread, with dropout, gradient clipping and a schedule. Compared bit for bit: the loss of every
step, every parameter and buffer, the optimizer's state, and the final state of the random
generators of torch, NumPy and Python. After ``close()`` nothing may be left: no hook, function
mode, patch or change of configuration. The rows of accidents end in an exception in mid-forward, in
backward, in the data loader, or a KeyboardInterrupt. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import logging
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode
from torch.utils.data import DataLoader, Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_utils import AttentionInterface
from transformers.trainer_callback import PrinterCallback

import stabmon
from stabmon.integrations.lightning import StabilityCallback as LightningCallback
from stabmon.integrations.transformers import StabilityCallback as TransformersCallback

BATCH, LENGTH, VOCABULARY = 4, 24, 64


@dataclass(frozen=True)
class Case:
    """One pair of runs."""

    loop: str
    variant: str = ""
    log_every: int = 7
    steps: int = 200
    accident: str = ""

    @property
    def name(self) -> str:
        return ", ".join(
            filter(None, (self.loop, self.variant, self.accident and f"{self.accident} at step 12"))
        )


@dataclass
class Outcome:
    """State left by a run."""

    losses: list[Tensor] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    readings: int = 0
    """Number of sampled steps with measurements."""
    complaints: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class Accident(RuntimeError):
    """The error of the rows of accidents."""


class Corpus(Dataset[dict[str, Tensor]]):
    """Random tokens, the same at each index; optionally raises at one row."""

    def __init__(self, rows: int, fails_at: int | None = None) -> None:
        self.tokens = torch.randint(
            1, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(7)
        )
        self.fails_at = fails_at
        self.read = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read += 1
        if self.fails_at is not None and self.read > self.fails_at:
            raise Accident("data loader")
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Fails(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Accident("backward")


class Mlp(nn.Module):
    """Wrapper of a model's first MLP with an accident in mid-forward."""

    def __init__(self, inner: nn.Module, accident: str) -> None:
        super().__init__()
        self.inner, self.accident, self.calls = inner, accident, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 12 and self.accident == "forward":
            raise Accident("forward")
        if self.calls == 12 and self.accident == "KeyboardInterrupt":
            raise KeyboardInterrupt
        x = self.inner(x)
        return Fails.apply(x) if self.calls == 12 and self.accident == "backward" else x


def make_model(case: Case) -> Any:
    """Make a GPT-2 with every dropout on, or a Llama with grouped heads."""
    torch.manual_seed(0)
    model: Any
    if "llama" in case.variant:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1 if "inductor" in case.variant else 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.1,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(config)
    else:
        sizes = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, use_cache=False, loss_type="ForCausalLM", **sizes)
        )
    if case.accident:
        model.transformer.h[0].mlp = Mlp(model.transformer.h[0].mlp, case.accident)
    if "LoRA" in case.variant:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
        )
    if "checkpointing" in case.variant:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in case.variant.split()})
    return model


def fails_at(case: Case) -> int | None:
    return 12 * BATCH if case.accident == "data loader" else None


def run_plain(case: Case, watched: bool, folder: Path) -> Outcome:
    """Train in a plain loop.

    With accumulation, autocast, compiling or DDP where the variant names it.
    """
    model, outcome = make_model(case), Outcome()
    before = surroundings(model)
    called: nn.Module = model
    if "compiled" in case.variant:
        # drops all compiled code (torch.compiler.reset calls it); checked with torch 2.13
        torch._dynamo.reset()
        called = torch.compile(
            model, backend="inductor" if "inductor" in case.variant else "aot_eager"
        )
    if "DDP" in case.variant:
        called = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=case.steps + 1)
    micro = 2 if "accumulation" in case.variant else 1
    rank = torch.distributed.get_rank() if "DDP" in case.variant else 0
    rows = range(rank * BATCH, 10**9, BATCH * (2 if "DDP" in case.variant else 1))
    corpus = Corpus(BATCH * 64)
    monitor = None
    if watched:
        options = {"sinks": ["jsonl"], "run_dir": folder, "reduce_ranks": "DDP" in case.variant}
        monitor = stabmon.AttentionStabilityMonitor(
            called,
            optimizer,
            schedule,
            "observe",
            log_every=case.log_every,
            max_overhead=1.0,
            **options,
        )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case.variant)

    def train() -> None:
        at = iter(rows)
        for step in range(case.steps):
            total = torch.zeros(())
            for _ in range(micro):
                start = next(at) % (len(corpus) - BATCH)
                if case.accident == "data loader" and step == 11:
                    raise Accident("data loader")
                tokens = corpus.tokens[start : start + BATCH]
                with autocast:
                    loss = called(input_ids=tokens, labels=tokens).loss / micro
                loss.backward()
                total = total + loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            outcome.losses.append(total)
            if monitor:
                diagnosis = monitor.on_step(total)
                outcome.readings += bool(diagnosis and diagnosis.stats)
            if "evaluation" in case.variant and step % 5 == 0:
                model.eval()
                with torch.no_grad():
                    called(input_ids=tokens, labels=tokens)
                    model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False)
                model.train()

    model.train()
    ended(outcome, train)
    outcome.state = state_of(model, optimizer)
    if monitor:
        outcome.complaints = dict(monitor.errors)
        monitor.close()
    outcome.left = left_behind(before, surroundings(model), optimizer)
    return outcome


def run_accelerate(case: Case, watched: bool, folder: Path) -> Outcome:
    """Train in a plain loop under Accelerate, two micro-batches per step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain, outcome = make_model(case).train(), Outcome()
    before = surroundings(plain)
    data = DataLoader(Corpus(BATCH * 2 * case.steps), BATCH)
    model, optimizer, data = accelerator.prepare(
        plain, torch.optim.AdamW(plain.parameters(), 3e-3), data
    )
    options: dict[str, Any] = {
        "sinks": ["jsonl"],
        "run_dir": folder,
        "log_every": case.log_every,
        "max_overhead": 1.0,
    }
    monitor = (
        stabmon.AttentionStabilityMonitor(model, optimizer, config="observe", **options)
        if watched
        else None
    )

    def train() -> None:
        for batch in data:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                outcome.losses.append(loss.detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if monitor and accelerator.sync_gradients:
                    diagnosis = monitor.on_step()
                    outcome.readings += bool(diagnosis and diagnosis.stats)

    ended(outcome, train)
    outcome.state = state_of(plain, optimizer)
    if monitor:
        outcome.complaints = dict(monitor.errors)
        monitor.close()
    outcome.left = left_behind(before, surroundings(plain), optimizer)
    return outcome


class Recorded(Trainer):
    """Record of every micro-batch's loss."""

    seen: list[Tensor]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.detach().clone())
        return loss


def run_transformers(case: Case, watched: bool, folder: Path) -> Outcome:
    """Train with the Hugging Face Trainer."""
    model, outcome = make_model(case), Outcome()
    before = surroundings(model)
    compiled = "compiled" in case.variant
    if compiled:
        torch._dynamo.reset()
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=case.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=50,
        gradient_accumulation_steps=2 if "accumulation" in case.variant else 1,
        bf16="autocast" in case.variant,
        eval_strategy="steps" if "evaluation" in case.variant else "no",
        eval_steps=20,
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
        seed=0,
        full_determinism=False,
    )
    callback = TransformersCallback("observe", log_every=case.log_every, max_overhead=1.0)
    corpus = Corpus(BATCH * 64, fails_at(case))
    callbacks: list[TrainerCallback] = [callback] if watched else []
    trainer = Recorded(
        model, arguments, train_dataset=corpus, eval_dataset=Corpus(8), callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    trainer.seen = outcome.losses
    ended(outcome, trainer.train)
    outcome.state = state_of(model, trainer.optimizer)
    if callback.monitor is not None:
        outcome.readings = len(callback.monitor._tracker.history)
        outcome.complaints = dict(callback.monitor.errors)
    callback.close()
    outcome.left = left_behind(before, surroundings(model), trainer.optimizer)
    return outcome


def words() -> Any:
    """Make a tokenizer of words ``w4`` … ``w63``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def run_trl(case: Case, watched: bool, folder: Path) -> Outcome:
    """Train with TRL's trainers and their own losses.

    The norm before clipping that TRL reports must be the reading's too.
    """
    import trl
    from datasets import Dataset as Rows

    model, outcome = make_model(case), Outcome()
    before = surroundings(model)
    texts = [
        " ".join(f"w{4 + (7 * row + 3 * at) % 60}" for at in range(4 + row % 5))
        for row in range(34)
    ]
    callback = TransformersCallback("observe", log_every=case.log_every, max_overhead=1.0)
    given: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    given |= {
        "max_steps": case.steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3e-3,
        "max_grad_norm": 0.1,
    }
    given |= {"logging_steps": 1, "gradient_checkpointing": False}
    more: dict[str, Any] = {"processing_class": words(), "callbacks": [callback] if watched else []}
    trainer: Any
    if "SFT" in case.variant:
        rows = Rows.from_dict({"text": texts[:32]})
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(str(folder), **given), train_dataset=rows, **more
        )
    elif "DPO" in case.variant:
        rows = Rows.from_dict(
            {"prompt": texts[:32], "chosen": texts[1:33], "rejected": texts[2:34]}
        )
        more["ref_model"] = make_model(case)
        trainer = trl.DPOTrainer(
            model, args=trl.DPOConfig(str(folder), **given), train_dataset=rows, **more
        )
    else:
        rows = Rows.from_dict({"prompt": texts[:32]})
        arguments = trl.GRPOConfig(str(folder), num_generations=4, max_completion_length=6, **given)
        more["reward_funcs"] = lambda completions, **_: [
            float(len(set(each.split()))) for each in completions
        ]
        trainer = trl.GRPOTrainer(model, args=arguments, train_dataset=rows, **more)
    trainer.remove_callback(PrinterCallback)
    ended(outcome, trainer.train)
    log = [each for each in trainer.state.log_history if "grad_norm" in each]
    outcome.losses = [torch.tensor(each["loss"]) for each in log]
    outcome.state = state_of(model, trainer.optimizer)
    if callback.monitor is not None:
        outcome.complaints = dict(callback.monitor.errors)
        norms = {each["step"]: each["grad_norm"] for each in log}
        for reading in callback.monitor._tracker.history.readings:
            outcome.readings += 1
            if not math.isclose(
                reading.gradients.get("", math.nan), norms[reading.step], rel_tol=1e-4
            ):
                outcome.complaints["gradient norm"] = outcome.complaints.get("gradient norm", 0) + 1
    callback.close()
    outcome.left = left_behind(before, surroundings(model), trainer.optimizer)
    return outcome


class Module(pl.LightningModule):
    """The model in Lightning."""

    def __init__(self, model: nn.Module, steps: int, seen: list[Tensor]) -> None:
        super().__init__()
        self.model, self.steps, self.seen = model, steps, seen

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.seen.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByHand(Module):
    """The same with manual optimisation: an optimizer per layer, clipped by hand."""

    def __init__(self, model: nn.Module, steps: int, seen: list[Tensor]) -> None:
        super().__init__(model, steps, seen)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        for optimizer in self.optimizers():
            loss = self.model(**batch).loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.seen.append(loss.detach().clone())

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters(), 3e-3) for layer in self.model.transformer.h]


def run_lightning(case: Case, watched: bool, folder: Path) -> Outcome:
    """Train with the Lightning Trainer."""
    model, outcome = make_model(case), Outcome()
    by_hand = "by hand" in case.variant
    module = (ByHand if by_hand else Module)(model.train(), case.steps, outcome.losses)
    before = surroundings(module)
    callback = LightningCallback(
        "observe", log_every=case.log_every, max_overhead=1.0, run_dir=folder
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=case.steps
        * (2 if by_hand else 1),  # Lightning counts the steps of every optimizer
        gradient_clip_val=None if by_hand else 1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if watched else [],
        default_root_dir=folder,
        accumulate_grad_batches=2 if "accumulation" in case.variant else 1,
        precision="bf16-mixed" if "autocast" in case.variant else 32,
        val_check_interval=10 if "evaluation" in case.variant else None,
        limit_val_batches=1.0 if "evaluation" in case.variant else 0,
    )
    data = DataLoader(Corpus(BATCH * 64, fails_at(case)), BATCH)
    ended(outcome, lambda: trainer.fit(module, data, DataLoader(Corpus(8), BATCH)))
    outcome.state = state_of(module, trainer.optimizers[0] if trainer.optimizers else None)
    if callback.monitor is not None:
        outcome.readings = len(callback.monitor._tracker.history)
        outcome.complaints = dict(callback.monitor.errors)
    callback.close()
    outcome.left = left_behind(before, surroundings(module), None)
    return outcome


RUNS = {"plain": run_plain, "transformers": run_transformers, "lightning": run_lightning}
OTHERS = {"accelerate": run_accelerate, "trl": run_trl}
"""Loops with rows of their own."""


def ended(outcome: Outcome, train: Callable[[], object]) -> None:
    """Train and record the end."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    try:
        train()
    except (Accident, KeyboardInterrupt, SystemExit) as error:
        outcome.error = type(error).__name__


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return everything that training changes, by name."""
    state: dict[str, Any] = {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items()
    }
    state |= {f"buffer {name}": tensor.clone() for name, tensor in model.named_buffers()}
    for index, (_, values) in enumerate(
        optimizer.state_dict()["state"].items() if optimizer is not None else ()
    ):
        state |= {
            f"optimizer {index} {name}": copy.deepcopy(value) for name, value in values.items()
        }
    state["torch generator"] = torch.get_rng_state()
    state["python generator"] = repr(random.getstate())
    state["numpy generator"] = repr(np.random.get_state())  # noqa: NPY002
    return state


def surroundings(model: nn.Module) -> dict[str, Any]:
    """Return everything a monitor could leave changed, by name.

    Compared by identity.
    """
    # Private names of torch, checked with torch 2.13; where one is renamed, an AttributeError, or
    # None on both sides for those read by getattr or get, and that leftover goes unseen:
    # torch._dynamo.eval_frame._maybe_set_eval_frame sets the frame evaluation of compiled code,
    # _get_current_function_mode is the innermost TorchFunctionMode, _..._hooks are the tables of
    # hooks of modules, parameters and optimizers, _compiled_call_impl is Module.compile's forward.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    things: dict[str, Any] = {
        "AttentionInterface.get_interface": AttentionInterface.__dict__["get_interface"],
        "torch.softmax": torch.softmax,
        "Tensor.softmax": torch.Tensor.softmax,
        "dynamo's setter": getattr(dynamo, "_maybe_set_eval_frame", None),
        "function mode": _get_current_function_mode(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    things |= {
        f"F.{name}": getattr(F, name)
        for name in ("scaled_dot_product_attention", "softmax", "multi_head_attention_forward")
    }
    things["mha globals"] = F.multi_head_attention_forward.__globals__[
        "scaled_dot_product_attention"
    ]
    for name, module in model.named_modules():
        for kind in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        ):
            things[f"{name}.{kind}"] = len(getattr(module, kind))
        things[f"{name}.forward"] = module.__dict__.get("forward")
        things[f"{name}._compiled_call_impl"] = module.__dict__.get("_compiled_call_impl")
        if hasattr(module, "config"):
            things[f"{name}.config"] = repr(module.config)
    for name, parameter in model.named_parameters():
        things[f"{name} hooks"] = len(parameter._backward_hooks or ())
        things[f"{name} gradient hooks"] = len(parameter._post_accumulate_grad_hooks or ())
    return things


def left_behind(before: dict[str, Any], after: dict[str, Any], optimizer: Any) -> list[str]:
    """Return the names of everything not restored.

    Changes by the framework itself are known from the unwatched run.
    """
    changed = [
        name
        for name in before
        if not (
            before[name] is after.get(name)
            or (isinstance(before[name], int | str) and before[name] == after.get(name))
        )
    ]
    inner = getattr(optimizer, "optimizer", optimizer)
    return changed + (
        ["optimizer hooks"] if inner is not None and inner._optimizer_step_pre_hooks else []
    )


def differences(plain: Outcome, watched: Outcome, case: Case) -> list[str]:
    """Return the differences between the paired runs; empty where there are none."""
    found = (
        [f"ended with {watched.error or 'no error'}, not {plain.error}"]
        if plain.error != watched.error
        else []
    )
    if len(plain.losses) != len(watched.losses):
        found.append(f"{len(watched.losses)} losses for {len(plain.losses)}")
    unequal = [
        i
        for i, (a, b) in enumerate(zip(plain.losses, watched.losses, strict=False))
        if not same(a, b)
    ]
    found += [f"loss of step {unequal[0] + 1}"] if unequal else []
    found += [
        name
        for name in plain.state.keys() | watched.state.keys()
        if not same(plain.state.get(name), watched.state.get(name))
    ]
    found += [f"left behind: {name}" for name in sorted(set(watched.left) - set(plain.left))]
    found += [
        f"stabmon failed in {where} {count} times" for where, count in watched.complaints.items()
    ]
    expected = 0 if case.accident else case.steps // case.log_every
    if not case.accident and watched.readings < expected:
        found.append(f"{watched.readings} readings for {expected}")
    return found


def same(left: Any, right: Any) -> bool:
    """Return whether two values are the same to the last bit, NaN included."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return (
            torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
            if left.dim()
            else bool(torch.equal(left, right) or (left.isnan() and right.isnan()))
        )
    return bool(left == right)


def pair(case: Case) -> tuple[list[str], Outcome]:
    """Run the pair and compare."""
    with tempfile.TemporaryDirectory() as folder:
        run = (RUNS | OTHERS)[case.loop]
        plain = run(case, False, Path(folder) / "plain")
        watched = run(case, True, Path(folder) / "watched")
    return differences(plain, watched, case), watched


def pair_over_ranks(case: Case) -> tuple[list[str], Outcome]:
    """Run the pair on two processes over gloo; return the differences on either."""
    context = torch.multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    with tempfile.NamedTemporaryFile() as store:
        processes = [
            context.Process(target=_on_rank, args=(rank, store.name + ".store", case, queue))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(170)
            if process.is_alive():
                process.kill()
        with contextlib.suppress(OSError):
            os.unlink(store.name + ".store")
    if any(process.exitcode != 0 for process in processes):
        return [f"exit status {[process.exitcode for process in processes]}"], Outcome()
    found, readings = [], 0
    for _ in processes:
        rank, differs, count = queue.get()
        found += [f"rank {rank}: {each}" for each in differs]
        readings = max(readings, count)
    return found, Outcome(readings=readings)


def _on_rank(rank: int, store: str, case: Case, queue: Any) -> None:
    quiet()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    found, watched = pair(case)
    queue.put((rank, found, watched.readings))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def cases(steps: int) -> Iterator[Case]:
    """Return every row."""
    few = partial(replace, steps=max(14, steps // 4))
    for loop in RUNS:
        for log_every in (1, 7, 10):
            yield Case(loop, "", log_every, steps)
        for variant in (
            "evaluation",
            "accumulation",
            "autocast",
            "checkpointing",
            "checkpointing reentrant",
            "llama",
        ):
            yield few(Case(loop, variant))
    yield few(Case("plain", "compiled aot_eager"))
    yield few(Case("plain", "compiled inductor, llama"))
    yield few(Case("transformers", "compiled aot_eager"))
    yield few(Case("plain", "DDP"))
    yield few(Case("plain", "LoRA"))
    yield few(Case("transformers", "LoRA"))
    yield few(Case("lightning", "by hand"))
    yield few(Case("accelerate", "accumulation"))
    for variant in ("SFT, llama", "DPO, llama", "GRPO, llama"):
        yield few(Case("trl", variant))
    for loop in RUNS:
        for accident in ("forward", "backward", "data loader", "KeyboardInterrupt"):
            yield Case(loop, "", 1, 20, accident)


def quiet() -> None:
    """Set one thread and silence the frameworks."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    given = parser.parse_args()
    quiet()
    print(f"{'loop, variant':<48}{'every':>6}{'steps':>6}{'readings':>9}{'seconds':>9}  result")
    failed, begun = 0, time.perf_counter()
    for case in cases(given.steps):
        if given.only not in case.name:
            continue
        if case.loop == "trl" and importlib.util.find_spec("trl") is None:
            print(
                f"{case.name:<48}not run: pip install -c constraints.txt -e '.[bench]'", flush=True
            )
            continue
        started = time.perf_counter()
        found, watched = pair_over_ranks(case) if "DDP" in case.variant else pair(case)
        failed += bool(found)
        result = (
            "identical"
            if not found
            else "DIFFERS: " + "; ".join(found[:4]) + (" …" if len(found) > 4 else "")
        )
        seconds = time.perf_counter() - started
        print(
            f"{case.name:<48}{case.log_every:>6}{case.steps:>6}{watched.readings:>9}"
            f"{seconds:>9.1f}  {result}",
            flush=True,
        )
    print(f"{failed} rows differ; {time.perf_counter() - begun:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
