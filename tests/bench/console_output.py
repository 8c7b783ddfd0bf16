"""Print the console output of a healthy run and of two unstable ones, and count their alerts.

A small GPT-2 trains for 300 steps on the standard library's text: healthy; with W_q and W_k times
1.01 after each step from step 100 on; and at 30 times the rate that fits. Each is watched at every
5, 10 and 50 steps, with the console and an offline run of Weights & Biases.
"""

if not __package__:
    import on_path  # noqa: F401

import argparse
import io
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import wandb
from inject_fault import ScaleQk
from transformers import GPT2Config, GPT2LMHeadModel

import stabmon
from stabmon.sinks import SINKS
from stabmon.tiny.corpus import load_corpus

LENGTH, BATCH, RATE = 64, 8, 1e-3


@dataclass
class Output:
    """What one run printed, and the alerts that it raised."""

    text: str
    alerts: list[str]


def run(
    kind: str, every: int, *, steps: int = 300, layers: int = 4, preset: str = "observe"
) -> Output:
    """Train one model and return its output."""
    torch.manual_seed(0)
    corpus = load_corpus(block=LENGTH)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=layers,
            n_head=4,
            n_positions=LENGTH,
            vocab_size=256,
            loss_type="ForCausalLM",
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    ).train()
    rate = RATE * (30 if kind == "rate" else 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1.0, (at + 1) / 20))
    fault = ScaleQk(factor=1.01, start=100)
    stream, alerts = io.StringIO(), []
    with tempfile.TemporaryDirectory() as folder:
        tracked = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(console="off"))
        raised = tracked.alert

        def alert(title: str, *rest: Any, **more: Any) -> None:
            alerts.append(title)
            raised(title, *rest, **more)

        tracked.alert = alert
        sinks = ["jsonl", SINKS["console"](file=stream), SINKS["wandb"](run=tracked)]
        with stabmon.AttentionStabilityMonitor(
            model,
            optimizer,
            scheduler,
            preset,
            log_every=every,
            sinks=sinks,
            run_dir=Path(folder) / "run",
        ) as monitor:
            for step, rows in enumerate(corpus.stream(steps, BATCH, seed=0), start=1):
                batch = corpus.train[rows]
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if kind == "driven":
                    fault.apply(model, step)
                monitor.on_step(loss)
                tracked.log({"loss": float(loss.detach())})
        tracked.finish()
        text = stream.getvalue().replace(folder, "runs")
    return Output(text, alerts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, nargs="+", default=[5, 10, 50])
    parser.add_argument("--kinds", nargs="+", default=["healthy", "driven", "rate"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--preset", default="observe")
    parser.add_argument("--out", type=Path, help="folder for the whole outputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'run':8} {'every':>5} {'lines':>6} {'characters':>10} {'alerts':>6}")
    for kind, every in itertools.product(args.kinds, args.every):
        found = run(kind, every, layers=args.layers, preset=args.preset)
        lines = found.text.splitlines()
        print(
            f"{kind:8} {every:5} {len(lines):6} {len(found.text):10} {len(found.alerts):6}",
            flush=True,
        )
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{kind}_{every}.txt").write_text(found.text)
            (args.out / f"{kind}_{every}_alerts.txt").write_text("\n".join(found.alerts))


if __name__ == "__main__":
    sys.exit(main())
