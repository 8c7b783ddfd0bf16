"""Measure the cost of controllers: controlled against plain training steps.

python tests/bench/controllers_speed.py           the tables, in about seven minutes
python tests/bench/controllers_speed.py --quick   a look, in about two
python tests/bench/controllers_speed.py --worst   a narrow model, where attention takes most
python tests/bench/controllers_speed.py --json    one JSON object instead
python tests/bench/controllers_speed.py --threads 1 --clock cpu   on a machine in use by others

Interleaved in one process. The model and the step are those of overhead.py: GPT-2 cut down in
proportion, forward, backward and AdamW, fused attention. A figure is the median over rounds of
(controlled / plain). The null row is plain against plain: what differs from 1 there is noise.
Memory is the peak of live tensor bytes of a step, made inside it, over that of the plain step, by a
dispatch mode that counts allocations; "largest" is the largest single tensor that one attention
module makes forward and backward, over one H x S x S tensor.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stabmon.controllers import attach_controllers
from tests.bench.overhead import (
    BATCHES,
    CLOCKS,
    SHAPES,
    LiveBytes,
    Run,
    counted,
    ratios,
    rounds,
)  # sets the environment first

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "info_density, key_bias": ("info_density", {"form": "key_bias"}),
    "info_density, query_gain": ("info_density", {"form": "query_gain"}),
    "info_density, both": ("info_density", {"form": "both"}),
    "linear_ramp": ("linear_ramp", {}),
    "linearization": ("linearization", {}),
}
LENGTHS = (512, 2048)
AIMS = {"time": 1.10, "memory": 1.05}
"""Aims of info_density, over plain fused attention."""


def controlled(length: int, what: str) -> Run:
    """Make a run with controllers in its model and optimizer."""
    run = Run(length)
    kind, options = KINDS[what]
    attach_controllers(run.model, kind, **options)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), 1e-4)
    return run


def memory_of(run: Run) -> int:
    """Return the peak bytes of one step's own tensors."""
    run.seconds_of(1)
    run.optimizer.zero_grad()
    with counted() as mode:
        output = run.model(run.ids, labels=run.ids)
        output.loss.backward()
        del output
    run.optimizer.zero_grad()
    return mode.peak


def largest_of(what: str, length: int) -> float:
    """Return the largest tensor of one controlled attention call.

    Forward and backward, over one H x S x S float32 tensor.
    """
    from transformers import GPT2Config, GPT2Model

    heads = 12
    sizes = {
        "n_layer": 1,
        "n_head": heads,
        "n_embd": heads * 64,
        "n_positions": length,
        "vocab_size": 8,
    }
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # _from_config: the constructor with an attention implementation; checked with transformers 5.23
    model = GPT2Model._from_config(
        GPT2Config(**sizes, **dropout, use_cache=False), attn_implementation="sdpa"
    ).train()
    kind, options = KINDS[what]
    attach_controllers(model, kind, **options)
    hidden = torch.randn(1, length, heads * 64, requires_grad=True)
    largest = 0

    class Watch(LiveBytes):
        def _count(self, storage: torch.UntypedStorage) -> None:
            nonlocal largest
            super()._count(storage)
            largest = max(largest, storage.nbytes())

    with Watch():
        output, _ = model.h[0].attn(hidden)
        output.sum().backward()
    return largest / (heads * length * length * 4)


def rows_of(length: int, seconds: float, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Measure every figure of one length."""
    plain = Run(length)
    low, middle, high = statistics.quantiles(
        (b / a for a, b in rounds(plain, Run(length), seconds)), n=4
    )
    yield {"S": length, "what": "null (plain / plain)", "time": middle, "spread": (high - low) / 2}
    whole = memory_of(plain)
    for what in kinds:
        run = controlled(length, what)
        time, spread = ratios(plain, run, seconds)
        yield {
            "S": length,
            "what": what,
            "time": time,
            "spread": spread,
            "memory": memory_of(run) / whole,
            "largest": largest_of(what, length),
        }


def main() -> int:
    """Print the table.

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
    parser.add_argument(
        "--what", action="append", choices=list(KINDS), help="one controller alone; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
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
        choices=list(BATCHES),
        help="one length alone; may be repeated",
    )
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    Run.clock = staticmethod(CLOCKS[args.clock])
    Run.shape = SHAPES["worst" if args.worst else "gpt2"]
    rows = []
    for length in args.length or LENGTHS:
        for row in rows_of(length, 8.0 if args.quick else 30.0, args.what or list(KINDS)):
            rows.append(row)
            print(f"S {length}: {row['what']} {row['time']:.3f}", file=sys.stderr)
    if args.json:
        print(json.dumps({"ratios": rows, "aims": AIMS}))
        return 0
    table = Table(title="a training step, controlled / plain fused attention", title_justify="left")
    heads = {
        "time": f"step time (aim {AIMS['time']:g} of info_density)",
        "memory": f"peak memory (aim {AIMS['memory']:g})",
    }
    columns = ["S", "what", "time", "spread", "memory", "largest"]
    for name in columns:
        shown = heads.get(name, "largest tensor / H x S x S" if name == "largest" else name)
        table.add_column(shown, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(
            *(
                f"{row[c]:.3f}" if isinstance(row.get(c), float) else str(row.get(c, ""))
                for c in columns
            )
        )
    Console(width=max(120, Console().width)).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
