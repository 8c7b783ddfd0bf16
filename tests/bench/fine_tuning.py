"""Count the alarms of fine-tuning a trained model at usual rates: there should be none.

python tests/bench/fine_tuning.py              ten runs of 150 steps, some minutes
python tests/bench/fine_tuning.py --steps 50   shorter ones

RXNMapper's ALBERT (12 layers of 8 heads, trained weights from pip) learns masked tokens of
esterifications and amide couplings, each run at a rate drawn between 1e-5 and 2e-4, with its own
seed, batch and warm-up. Heads of a trained model are sharp for a reason. Two more runs, at 300 times
a usual rate, should alarm.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import math
import random
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stabmon
from tests.bench.albert import AlbertUnavailable, Encode, load_albert

GROUPS = (
    "C",
    "CC",
    "CCC",
    "CC(C)",
    "CCCC",
    "c1ccccc1",
    "Cc1ccccc1",
    "Fc1ccccc1",
    "C1CCCCC1",
    "CCOC",
)
MASK_SHARE = 0.15


def reaction(rng: random.Random) -> str:
    """Return an esterification or an amide coupling of two drawn groups, in SMILES."""
    acid, other = rng.choice(GROUPS), rng.choice(GROUPS)
    atom = rng.choice("ON")
    return f"{acid}C(=O)O.{atom}{other}>>{acid}C(=O){atom}{other}"


def batch(
    encode: Encode, rng: random.Random, size: int, mask: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs with masked tokens ``[B, S]``, and the labels, -100 where nothing is masked."""
    inputs = encode([reaction(rng) for _ in range(size)])
    ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
    drawn = torch.tensor([[rng.random() for _ in row] for row in ids.tolist()]) < MASK_SHARE
    hidden = drawn & seen
    hidden[:, 1] = True  # never an empty batch
    labels = ids.masked_fill(~hidden, -100)
    return inputs | {"input_ids": ids.masked_fill(hidden, mask)}, labels


def run(seed: int, rate: float, steps: int) -> tuple[float, float, int, list[str]]:
    """Fine-tune once; return first and last loss, samples and alarms."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, encode = load_albert()
    model.train()
    vocabulary = model.config.vocab_size
    size, warmup = rng.choice([8, 16]), rng.choice([0, 10, 20])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    losses, samples = [], 0
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=50, sinks=[]) as monitor:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))
            inputs, labels = batch(encode, rng, size, mask=min(4, vocabulary - 1))
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            samples += monitor.on_step(loss) is not None
            losses.append(loss.item())
    alarms = [f"{i.issue_type} {i.where} step {i.step}" for i in monitor.issues if i.is_alarm]
    tail = losses[-10:]
    return losses[0], sum(tail) / len(tail), samples, alarms


def main() -> int:
    """Print a row for each run, and the number of runs with an alarm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="fine-tuning of a trained model", title_justify="left")
    for name in ("rate", "loss first", "last", "samples", "alarms", "first alarm"):
        table.add_column(name, justify="right")
    drawn = random.Random(0)
    usual = [math.exp(drawn.uniform(math.log(1e-5), math.log(2e-4))) for _ in range(args.runs)]
    alarmed = 0
    try:
        for seed, rate in enumerate([*usual, 0.015, 0.03]):
            first, last, samples, alarms = run(seed, rate, args.steps)
            alarmed += bool(alarms) and seed < args.runs
            table.add_row(
                f"{rate:.2g}",
                f"{first:.2f}",
                f"{last:.2f}",
                str(samples),
                str(len(alarms)),
                alarms[0] if alarms else "",
            )
    except AlbertUnavailable as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 0
    Console(width=max(120, Console().width)).print(table)
    print(f"usual rates: {alarmed} of {args.runs} runs alarmed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
