"""Measure ``stabmon watch``, and show its screens.

CPU of a look at 100 MB of records: the first one, one with a new reading, one without news, beside
reading all records. Captures at 80 x 24 of the same 32-layer run, healthy and with W_q and W_k of
four layers growing by 1% a step.

    python tests/bench/watch.py [--megabytes 100] [--runs FOLDER] [--steps 300]
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.text import Text
from transformers import GPT2Config, GPT2LMHeadModel

import stabmon
from stabmon.cli.watching.app import KEYS
from stabmon.cli.watching.layer_page import layer_lines
from stabmon.cli.watching.screen import Chosen, Screen
from stabmon.records import Reading, StabilityIssue
from stabmon.signals import SIGNALS
from stabmon.sinks.jsonl import READINGS, JsonlSink
from stabmon.sinks.reader import read_records
from stabmon.sinks.stored.run_tail import RunTail

LAYERS, HEADS = 32, 16
GROWTH_FROM = 60
"""First step after which W_q and W_k of four layers grow."""


def small_gpt2() -> GPT2LMHeadModel:
    """Return a GPT-2 of 32 layers of 16 heads, width 64."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        vocab_size=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config).train()


def train(folder: Path, steps: int, growth: float) -> None:
    """Train on walks over 128 tokens; W_q and W_k of four layers times ``growth`` a step."""
    model = small_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=40)
    generator = torch.Generator().manual_seed(1)
    with stabmon.AttentionStabilityMonitor(
        model,
        optimizer,
        config="observe",
        log_every=10,
        schedule="fixed",
        sinks=["jsonl"],
        run_dir=folder,
    ) as monitor:
        for step in range(1, steps + 1):
            moves = torch.randint(-2, 3, (4, 48), generator=generator)
            start = torch.randint(0, 128, (4, 1), generator=generator)
            tokens = (start + moves.cumsum(1)) % 128
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if growth != 1.0 and step > GROWTH_FROM:
                with torch.no_grad():
                    for layer in model.transformer.h[8:12]:
                        layer.attn.c_attn.weight[:, :128].mul_(growth)
            monitor.on_step(loss=loss)


def write_records(folder: Path, megabytes: float, layers: int, heads: int) -> JsonlSink:
    """Write readings of random signals and some issues; return the sink, still open."""
    folder.mkdir(parents=True)
    sink, rng, step = JsonlSink(), np.random.default_rng(0), 0
    sink.open(folder, {})
    while (folder / READINGS).stat().st_size < megabytes * 1e6:
        step += 10
        sink.write_reading(reading(step, layers, heads, rng), {})
        if step % 200 == 0:
            sink.write_issue(issue(step, (step // 200) % layers))
    return sink


def reading(step: int, layers: int, heads: int, rng: np.random.Generator) -> Reading:
    """Return a reading of random signals, as many as a run has by default."""
    names = [f"model.layers.{layer}.self_attn" for layer in range(layers)]
    values = {name: {signal: rng.random(heads) for signal in SIGNALS} for name in names}
    losses = tuple((each, 1.0) for each in range(step - 9, step + 1))
    return Reading(step, 10 / (1 + step / 1000), values, learning_rate=1e-3, losses=losses)


def issue(step: int, layer: int) -> StabilityIssue:
    """Return a warning that opens."""
    name = f"model.layers.{layer}.self_attn"
    return StabilityIssue(step, name, 0, "logit_growth", "warning", 20.0, 48.0, "Watch it.")


def milliseconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    before = time.process_time()
    work()
    return 1e3 * (time.process_time() - before)


def costs(megabytes: float, layers: int, heads: int) -> dict[str, float]:
    """Return CPU milliseconds of looks at a run of this size, drawing at 80 x 24 apart."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "stabmon"
        sink = write_records(folder, megabytes, layers, heads)
        step = int(megabytes * 1e6)
        tail, rng = RunTail(folder), np.random.default_rng(1)
        Screen(RunTail(folder).look()).lines(80, 24)  # loads rules and signals
        found = {"first look": milliseconds(tail.look)}
        with_news, without, drawn = [], [], []
        for place in range(20):
            sink.write_reading(reading(step + 10 * place, layers, heads, rng), {})
            with_news.append(milliseconds(tail.look))
            without.append(milliseconds(tail.look))
            drawn.append(milliseconds(lambda: Screen(tail.look()).lines(80, 24)))
        found["look with a new reading"] = float(np.median(with_news))
        found["look without news"] = float(np.median(without))
        found["drawing"] = float(np.median(drawn))
        layer = "model.layers.0.self_attn"
        found["history of a layer"] = milliseconds(lambda: tail.layer_history(layer))
        found["reading all records"] = milliseconds(lambda: read_records(folder))
        sink.close()
        return found


def captures(runs: Path, steps: int) -> None:
    """Print the screens of a healthy and a driven run of 32 layers, training them if need be."""
    for name, growth in (("healthy", 1.0), ("driven", 1.01)):
        if not (runs / name / "stabmon").is_dir():
            train(runs / name, steps, growth)
        tail = RunTail(runs / name / "stabmon")
        state = replace(tail.look(), last_line=time.time() - 4)
        print(f"\n{name}, 80 x 24")
        show(Screen(state, Chosen(footer=KEYS)).lines(80, 24))
        if state.open_issues and state.reading is not None:
            layer = next(each.layer for each in state.open_issues if each.layer)
            mine = [each for each in state.open_issues if each.layer == layer]
            print(f"\n{name}, {layer}")
            show(layer_lines(layer, state.reading, tail.layer_history(layer), mine, 80, 24))


def show(lines: Sequence[Text]) -> None:
    """Print lines in a frame."""
    print("+" + "-" * 80 + "+")
    for line in lines:
        print(f"|{line.plain:<80}|")
    print("+" + "-" * 80 + "+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--runs", type=Path, help="folder to keep the runs of the captures in")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    for layers, heads in ((32, 16), (4, 4)):
        found = costs(given.megabytes, layers, heads)
        print(f"{given.megabytes:.0f} MB, {layers} layers x {heads} heads, CPU ms:")
        for name, value in found.items():
            print(f"  {name:<24} {value:10.1f}")
    with tempfile.TemporaryDirectory() as folder:
        captures(given.runs or Path(folder), given.steps)


if __name__ == "__main__":
    main()
