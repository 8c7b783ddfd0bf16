"""Measure the cost of monitoring: monitored against plain training steps.

python tests/bench/overhead.py           the tables, in about twelve minutes on two free cores
python tests/bench/overhead.py --quick   a look, in about four
python tests/bench/overhead.py --worst   a narrow model with few tokens: attention takes most
python tests/bench/overhead.py --json    one JSON object instead
python tests/bench/overhead.py --threads 1 --clock cpu   on a machine in use by others

Interleaved in one process. A step is forward, backward and AdamW of GPT-2's smallest model cut down
in proportion: its width, heads and MLP, a sixth of its layers and of its vocabulary, so that
attention and everything else take the shares of a step that they take in the whole model. Weights
are random and there is no dropout (with it, torch's CPU kernel is slow and watching looks cheaper
than it is). Plain and watched steps alternate; a figure is the median over rounds of (watched /
plain), so that whatever else the machine does hits both. The null row is plain against plain: what
differs from 1 there is noise. "every 1" is measured as it stands, and so is "every 10" in the row
that says so, over runs of ten steps. Elsewhere every 10 and 50 are derived: ((N - 1) x an unsampled
step + a sampled one) / N. What an unsampled step adds is too little to show in a ratio: it is the
median difference in seconds for the same model on eight tokens, over the seconds of a plain step.
Memory is the peak of live tensor bytes that measuring one call adds, by a dispatch mode that counts
allocations, as a share of one H x S x S float32 tensor.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import torch
from rich.console import Console
from rich.table import Table

# private paths, checked with torch 2.13: a documented class that sees operators below autograd,
# and the leaves of nested arguments; without them no memory is counted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import stabmon
from stabmon.operator import attention_operator
from stabmon.signals import measure

BATCHES = {128: 8, 512: 2, 2048: 1}
"""S -> batch."""
SHAPES = {"gpt2": (768, 2, 50257 // 6), "worst": (384, 2, 256)}
"""(width, layers, vocabulary); head dimension 64."""
AIMS = {1: 1.10, 10: 1.01, 50: 1.002}
MEMORY_AIM = 0.05
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Run:
    """One model in training."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    shape = SHAPES["gpt2"]

    def __init__(self, length: int, attention: str = "sdpa", tokens: int | None = None) -> None:
        batch, (width, layers, vocabulary) = BATCHES[length], self.shape
        torch.manual_seed(0)
        shape = {
            "n_layer": layers,
            "n_head": width // 64,
            "n_embd": width,
            "vocab_size": vocabulary,
            "n_positions": length,
        }
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            **shape, **dropout, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLMLoss"
        )
        # _from_config: the constructor with an attention implementation; transformers 5.23
        self.model = GPT2LMHeadModel._from_config(config, attn_implementation=attention).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.ids = torch.randint(0, vocabulary, (batch, length) if tokens is None else (1, tokens))
        self.look: Callable[[Any], object] = lambda output: None
        self.after: Callable[[torch.Tensor], object] = lambda loss: None
        self.options: dict[str, Any] = {}

    def seconds_of(self, steps: int) -> float:
        """Return the seconds of so many whole steps."""
        began = self.clock()
        for _ in range(steps):
            self.optimizer.zero_grad()
            output = self.model(self.ids, labels=self.ids, **self.options)
            self.look(output)
            output.loss.backward()
            self.optimizer.step()
            self.after(output.loss)
        return self.clock() - began


def rounds(plain: Run, other: Run, seconds: float, steps: int = 1) -> list[tuple[float, float]]:
    """Return (plain, other) seconds of rounds of ``steps`` each, in alternating order."""
    plain.seconds_of(2)
    other.seconds_of(
        max(2, steps)
    )  # a run that samples every so many steps stays in time with its rounds
    found: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < until:
        first, second = (plain, other) if len(found) % 2 else (other, plain)
        times = {first: first.seconds_of(steps), second: second.seconds_of(steps)}
        found.append((times[plain], times[other]))
    return found


def ratios(plain: Run, other: Run, seconds: float, steps: int = 1) -> tuple[float, float]:
    """Return the median of other / plain, and half its interquartile range."""
    low, middle, high = statistics.quantiles(
        (b / a for a, b in rounds(plain, other, seconds, steps)), n=4
    )
    return middle, (high - low) / 2


def watched(
    length: int, every: int, tokens: int | None = None, **config: Any
) -> tuple[Run, stabmon.AttentionStabilityMonitor]:
    """Make a run with a monitor of every ``every``-th step."""
    run = Run(length, tokens=tokens)
    monitor = stabmon.AttentionStabilityMonitor(
        run.model,
        run.optimizer,
        config="observe",
        log_every=every,
        schedule="fixed",
        sinks=[],
        **config,
    )
    run.after = lambda loss: monitor.on_step(loss=loss)
    return run, monitor


def rows_of(length: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure every figure of one length."""
    plain = Run(length)

    null = rounds(plain, Run(length), seconds)
    low, middle, high = statistics.quantiles((b / a for a, b in null), n=4)
    yield {
        "S": length,
        "what": "null (plain / plain)",
        "every 1": middle,
        "spread": (high - low) / 2,
    }
    run, monitor = watched(length, 10**9, tokens=8)
    added = statistics.median(b - a for a, b in rounds(Run(length, tokens=8), run, seconds))
    monitor.close()
    unsampled = 1 + added / statistics.median(a for a, _ in null)

    def row(what: str, sampled: tuple[float, float], rest: float = 1.0) -> dict[str, Any]:
        every = {f"every {n}": ((n - 1) * rest + sampled[0]) / n for n in AIMS}
        return {"S": length, "what": what, **every, "spread": sampled[1], "unsampled": rest}

    engines = ["auto", "blockwise", "fused", *(["dense"] if length == 128 else [])]
    choices: dict[str, dict[str, Any]] = {
        f"stabmon, engine {name}": {"engine": name} for name in engines
    }
    choices["stabmon, entropy and max logit alone"] = {
        "signals": ["attention_entropy", "normalized_entropy", "max_logit"]
    }
    for what, config in choices.items():
        run, monitor = watched(length, 1, **config)
        sampled = ratios(plain, run, seconds)
        if monitor.errors:
            raise RuntimeError(f"{what} failed inside: {dict(monitor.errors)}")
        monitor.close()
        yield row(what, sampled, unsampled)
    if length == min(BATCHES):
        run, monitor = watched(length, 10)
        real = ratios(plain, run, 2 * seconds, steps=10)
        monitor.close()
        yield {
            "S": length,
            "what": "stabmon, engine auto, in runs of ten steps",
            "every 10": real[0],
            "spread": real[1],
        }
    eager = Run(length, "eager")
    eager.options = {"output_attentions": True}
    yield row("eager, output_attentions=True", ratios(plain, eager, seconds / 2))
    eager.look = entropy_and_maximum
    yield row("the same, and their entropy and maximum", ratios(plain, eager, seconds / 2))
    yield from others(length, plain, seconds / 2, row)


@torch.no_grad()
def entropy_and_maximum(output: Any) -> list[tuple[list[float], list[float]]]:
    """Compute two statistics per head from returned weights."""
    return [
        (
            torch.special.entr(p).sum(-1).mean(dim=(0, 2)).tolist(),
            p.amax(-1).mean(dim=(0, 2)).tolist(),
        )
        for p in output.attentions
    ]


def others(
    length: int, plain: Run, seconds: float, row: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measure other tools, where they are installed."""
    try:
        import wandb
    except ImportError:
        yield {"S": length, "what": "wandb.watch (not installed)"}
    else:
        import tempfile

        with (
            tempfile.TemporaryDirectory() as folder,
            wandb.init(project="overhead", dir=folder, mode="offline") as wandb_run,
        ):
            run = Run(length)
            wandb_run.watch(run.model, log="all", log_freq=1)
            run.after = lambda loss: wandb_run.log({"loss": loss.item()})
            yield row("wandb.watch(log='all')", ratios(plain, run, seconds))
            wandb_run.unwatch(run.model)
    try:
        from torch_module_monitor import ModuleMonitor  # type: ignore[import-not-found]
    except ImportError:
        yield {"S": length, "what": "torch-module-monitor (not installed)"}
    else:
        run = Run(length)
        other = ModuleMonitor(monitor_step_fn=lambda step: True)
        other.set_module(run.model)
        other.add_activation_metric("norm", lambda x: x.norm(dim=-1))
        steps = iter(range(10**9))

        def around(loss: torch.Tensor) -> None:
            other.end_step()
            other.begin_step(next(steps))

        other.begin_step(next(steps))
        run.after = around
        yield row("torch-module-monitor, norms of activations", ratios(plain, run, seconds))


class LiveBytes(TorchDispatchMode):
    """Count of the live bytes of storages made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.untyped_storage().data_ptr() not in given | self._known
            ):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        self._known.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._known.discard(pointer)
            self.live -= size

        weakref.finalize(storage, gone)


@contextmanager
def counted() -> Iterator[LiveBytes]:
    """Return a counting dispatch mode, with the garbage collector out of the way."""
    gc.collect()
    with LiveBytes() as mode:
        yield mode


def memory(length: int, engine: str) -> float:
    """Return the peak memory of measuring one call of 8 heads.

    As a share of one H x S x S float32 tensor.
    """
    query, key = torch.randn(1, 8, length, 64), torch.randn(1, 8, length, 64)
    with counted() as mode:
        operator = attention_operator(query, key, scale=0.125, is_causal=True, engine=engine)
        measure(operator, list(stabmon.StabilityConfig().signals))
    return mode.peak / (8 * length * length * 4)


def main() -> int:
    """Print the tables.

    Returns the exit status: 0, since aims are reported, not enforced.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: a look, not a measurement"
    )
    parser.add_argument(
        "--worst", action="store_true", help="a narrow model with hardly a vocabulary"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="torch threads; 1 where other work shares the machine",
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu counts this process's own time only"
    )
    parser.add_argument(
        "--length",
        type=int,
        action="append",
        choices=BATCHES,
        help="one length instead of all; may be repeated",
    )
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    Run.clock = staticmethod(CLOCKS[args.clock])
    Run.shape = SHAPES["worst" if args.worst else "gpt2"]
    seconds = 4.0 if args.quick else 20.0
    rows = []
    for length in args.length or BATCHES:
        for row in rows_of(length, seconds):
            rows.append(row)
            print(f"S {length}: {row['what']}", file=sys.stderr)
    shares = {
        engine: {length: memory(length, engine) for length in (1024, 2048, 4096)}
        for engine in ("blockwise", "fused")
    }
    if args.json:
        print(
            json.dumps(
                {"ratios": rows, "aims": AIMS, "memory_share": shares, "memory_aim": MEMORY_AIM}
            )
        )
        return 0
    table = Table(title="step time, watched / plain", title_justify="left")
    columns = ["S", "what", *(f"every {n}" for n in AIMS), "spread", "unsampled"]
    for name in columns:
        aim = next((f" (aim {AIMS[n]:g})" for n in AIMS if name == f"every {n}"), "")
        table.add_column(name + aim, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(
            *(
                f"{row[c]:.4f}" if isinstance(row.get(c), float) else str(row.get(c, ""))
                for c in columns
            )
        )
    Console(width=max(120, Console().width)).print(table)
    memory_table = Table(
        title=f"transient memory / one H x S x S float32 tensor (aim {MEMORY_AIM:g} at 4096)",
        title_justify="left",
    )
    for name in ("engine", "1024", "2048", "4096"):
        memory_table.add_column(name, justify="right")
    for engine, by_length in shares.items():
        memory_table.add_row(engine, *(f"{share:.4f}" for share in by_length.values()))
    Console().print(memory_table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
