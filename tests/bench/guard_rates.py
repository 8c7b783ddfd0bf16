"""Measure "guard" on learning rates 3, 5, 10 or 30 times too high.

python tests/bench/guard_rates.py       the whole table, three seeds, half an hour on two cores
python tests/bench/guard_rates.py --kinds start --times 10 --seeds 1

Final losses without guard, with it, and at the right rate. Four kinds of run: a fresh model without
a warm-up (``start``), with one (``warmup``), a trained model that is tuned on another text
(``trained``), and the same through LoRA (``lora``). The right rate of a kind is the best of a grid
of factors of two, by the final loss of seed 0. A loss is the mean over the last 30 steps. ``worse``
marks rows where guard ends more than 0.02 nats above doing nothing.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabmon
from stabmon.tiny.corpus import default_text, library_text

STEPS, TAIL, BATCH, LENGTH, WARMUP, EVERY = 240, 30, 8, 48, 50, 5
GRIDS = {
    "start": (4.5e-4, 9e-4, 1.8e-3, 3.6e-3, 7.2e-3),
    "warmup": (9e-4, 1.8e-3, 3.6e-3, 7.2e-3, 1.4e-2),
    "trained": (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
    "lora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}
"""Learning rates tried for each kind."""
MARGIN = 0.02
"""Nats by which two runs may differ and count as equal."""


@dataclass(frozen=True)
class Job:
    """One run."""

    kind: str
    rate: float
    seed: int
    config: str | None = None
    """Configuration of the monitor; None for none."""


@dataclass(frozen=True)
class Outcome:
    """Final loss and interventions of a run."""

    loss: float
    alarm: int | None
    """Step of the first alarm."""
    fitting_rate: float | None
    """First learning rate reported to fit."""
    interventions: str


def train(job: Job) -> Outcome:
    """Train one run on one thread."""
    torch.set_num_threads(1)
    logging.getLogger("stabmon").setLevel(logging.CRITICAL)
    model = _model(job)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, job.rate)
    warmup = WARMUP if job.kind == "warmup" else 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup)
    )
    text = "topics" if job.kind in ("start", "warmup") else "library"
    data, losses = torch.Generator().manual_seed(100 + job.seed), []
    monitor = None
    if job.config is not None:
        monitor = stabmon.AttentionStabilityMonitor(
            model, optimizer, schedule, config=job.config, log_every=EVERY, sinks=[]
        )
    for _ in range(STEPS):
        loss = _loss(model, _batch(text, data), inside=job.kind in ("trained", "lora"))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if monitor is not None:
            monitor.on_step(loss=loss.detach())
    if monitor is None:
        return Outcome(fmean(losses[-TAIL:]), None, None, "")
    alarms = [issue for issue in monitor.issues if issue.is_alarm]
    fitting_rate = [
        issue.evidence["fitting_rate"] for issue in alarms if "fitting_rate" in issue.evidence
    ]
    interventions = ", ".join(
        f"{each.intervention.name}@{each.step}"
        for each in monitor.applied
        if each.intervention.name != "skip_step"
    )
    monitor.close()
    return Outcome(
        fmean(losses[-TAIL:]),
        alarms[0].step if alarms else None,
        fitting_rate[0] if fitting_rate else None,
        interventions,
    )


def _loss(model: nn.Module, tokens: Tensor, inside: bool) -> Tensor:
    """Return the loss of the model's own output, or of a loop's own function."""
    if inside:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _model(job: Job) -> nn.Module:
    if job.kind in ("start", "warmup"):
        torch.manual_seed(job.seed)
        return _fresh()
    model = _fresh()
    model.load_state_dict(_trained())
    torch.manual_seed(job.seed)
    if job.kind == "trained":
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, lora)
    return adapted.train()


def _fresh() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).train()


@functools.cache
def _trained() -> dict[str, Tensor]:
    """Return the weights after 800 steps at a good, falling rate.

    The same in every process.
    """
    torch.manual_seed(0)
    model = _fresh()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 800)
    data = torch.Generator().manual_seed(7)
    for _ in range(800):
        loss = _loss(model, _batch("topics", data), inside=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@functools.cache
def _bytes(text: str) -> Tensor:
    _, raw = default_text() if text == "topics" else library_text()
    return torch.frombuffer(bytearray(raw[:2_000_000]), dtype=torch.uint8).long()


def _batch(text: str, generator: torch.Generator) -> Tensor:
    whole = _bytes(text)
    starts = torch.randint(0, len(whole) - LENGTH, (BATCH, 1), generator=generator)
    return whole[starts + torch.arange(LENGTH)]


def main() -> int:
    """Print the table. Returns 1 where guard made a row worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--times", nargs="+", type=float, default=[3.0, 5.0, 10.0, 30.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn")
    ) as pool:  # each process trains its base once
        return _table(args, lambda jobs: dict(zip(jobs, pool.map(train, jobs), strict=True)))


def _table(args: argparse.Namespace, run_all: Callable[[list[Job]], dict[Job, Outcome]]) -> int:
    """Print each row as soon as it is known."""
    right = {}
    for kind in args.kinds:
        tried = run_all([Job(kind, rate, 0) for rate in GRIDS[kind]])
        best = min(tried, key=lambda job: tried[job].loss)
        right[kind] = best.rate
        print(
            f"{kind:8s} right rate {best.rate:.2g} of",
            {job.rate: round(tried[job].loss, 3) for job in tried},
            flush=True,
        )
    print(
        f"{'kind':8s} {'times':>5s} {'without':>8s} {'guard':>8s} {'right':>8s}  first alarms, "
        "fitting rate and interventions of seed 0",
        flush=True,
    )
    worse, rows = 0, [(kind, times) for kind in args.kinds for times in (1.0, *args.times)]
    at_right: dict[str, list[Outcome]] = {}
    for kind, times in rows:
        jobs = [
            Job(kind, right[kind] * times, seed, config)
            for config in (None, "guard")
            for seed in range(args.seeds)
        ]
        found = run_all(jobs)
        without, guarded = (
            [found[job] for job in jobs if job.config == config] for config in (None, "guard")
        )
        best = at_right.setdefault(kind, without)
        means = [fmean(each.loss for each in runs) for runs in (without, guarded, best)]
        bad = any(not g.loss <= w.loss + MARGIN for g, w in zip(guarded, without, strict=True))
        worse += bad
        fitting_rate = "-" if guarded[0].fitting_rate is None else f"{guarded[0].fitting_rate:.2g}"
        marks = " ".join(f"{value:8.3f}" for value in means)
        alarms = [each.alarm for each in guarded]
        print(
            f"{kind:8s} {times:5.0f} {marks}  {alarms} {fitting_rate} "
            f"{guarded[0].interventions}{'  worse' if bad else ''}",
            flush=True,
        )
    print(
        f"rows in which guard ended worse than doing nothing in some seed: {worse} of {len(rows)}"
    )
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
