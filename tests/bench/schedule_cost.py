"""Measure what a schedule adds to a healthy run, beside the same run without stabmon.

python tests/bench/schedule_cost.py                 a table, in some ten minutes on a free core
python tests/bench/schedule_cost.py --steps 400     longer runs

Two byte-level GPTs on English text train from one seed in one process, in turn step by step: one is
watched. A figure is CPU time of the watched run over that of the plain one, over the whole run; the
null row is plain beside plain, and what differs from 1 there is noise. Beside it stand the number of
samples, what one of them adds in steps (the median of sampled steps over the median of plain ones,
less 1) and what a step without a sample adds (a ratio of medians, less 1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import stabmon
from stabmon.tiny.corpus import default_text

SHAPES = {
    "tiny: 2 layers of 64, 8 x 64 tokens": (2, 64, 4, 8, 64),
    "small: 4 layers of 256, 8 x 128 tokens": (4, 256, 4, 8, 128),
}
"""Layers, width, heads, batch, length."""
SCHEDULES: Mapping[str, Mapping[str, Any] | None] = {
    "null (plain beside plain)": None,
    "fixed, every 50": {"log_every": 50, "schedule": "fixed"},
    "adaptive, every 50": {"log_every": 50},
    "fixed, every 5": {"log_every": 5, "schedule": "fixed"},
    "adaptive, every 5": {"log_every": 5},
}


class Trainer:
    """One model in training on random windows of a text."""

    def __init__(self, shape: tuple[int, int, int, int, int], steps: int) -> None:
        layers, width, heads, self.batch, self.length = shape
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=layers,
                n_embd=width,
                n_head=heads,
                n_positions=self.length,
                vocab_size=256,
                bos_token_id=0,
                eos_token_id=0,
                loss_type="ForCausalLMLoss",
                **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            )
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, weight_decay=0.1)
        self.warm_up = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.05, 1.0, steps // 20)
        self.generator = torch.Generator().manual_seed(1)
        self.monitor: stabmon.AttentionStabilityMonitor | None = None

    def step(self, text: torch.Tensor) -> tuple[float, bool]:
        """Make one step; return its seconds of CPU, and whether it was sampled."""
        starts = torch.randint(len(text) - self.length, (self.batch,), generator=self.generator)
        ids = torch.stack([text[at : at + self.length] for at in starts.tolist()])
        began = time.process_time()
        self.optimizer.zero_grad()
        loss = self.model(ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.warm_up.step()
        diagnosis = None if self.monitor is None else self.monitor.on_step(loss=loss)
        took = time.process_time() - began
        return took, diagnosis is not None and diagnosis.readings[-1].sampled


def measure(
    shape: tuple[int, int, int, int, int], steps: int, settings: Mapping[str, Any] | None
) -> dict[str, float]:
    """Train a plain and a watched model in turn; return the row of figures."""
    text = torch.tensor(list(default_text()[1]), dtype=torch.long)
    plain, other = Trainer(shape, steps), Trainer(shape, steps)
    Trainer(shape, steps).step(text)  # the first step of a process is slow
    if settings is not None:
        other.monitor = stabmon.AttentionStabilityMonitor(
            other.model, other.optimizer, sinks=[], **settings
        )
    taken: list[tuple[float, float, bool]] = []
    for at in range(steps):
        order = (plain, other) if at % 2 else (other, plain)
        found = {each: each.step(text) for each in order}
        taken.append((found[plain][0], *found[other]))
    alarms = 0
    if other.monitor is not None:
        alarms = sum(issue.is_alarm for issue in other.monitor.issues)
        if other.monitor.errors:
            raise RuntimeError(f"stabmon failed inside: {dict(other.monitor.errors)}")
        other.monitor.close()
    usual = statistics.median(a for a, *_ in taken)
    sampled = [b for _, b, is_sampled in taken if is_sampled]
    rest = [b for _, b, is_sampled in taken if not is_sampled]
    return {
        "ratio": sum(b for _, b, _ in taken) / sum(a for a, *_ in taken),
        "samples": len(sampled),
        "a sample adds": statistics.median(sampled) / usual - 1 if sampled else 0.0,
        "a step adds": statistics.median(rest) / usual - 1 if rest else 0.0,
        "alarms": alarms,
    }


def rows(steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape and schedule."""
    for name, shape in SHAPES.items():
        for kind, settings in SCHEDULES.items():
            yield {"model": name, "schedule": kind, **measure(shape, steps, settings)}


def main() -> int:
    """Print the table; return the exit status, 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of a run")
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"runs of {args.steps} steps, watched / plain", title_justify="left")
    for row in rows(args.steps):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(f"{row['model']}: {row['schedule']}", file=sys.stderr)
        if not table.columns:
            for name in row:
                table.add_column(name, justify="left" if isinstance(row[name], str) else "right")
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    if not args.json:
        Console(width=max(120, Console().width)).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
