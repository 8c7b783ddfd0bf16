"""Train small models in each way of running over ranks, and check what rank 0 records of them.

python tests/bench/scale.py [--cells "PP"] [--cells "TP, bf16"]

Cells are {plain, compile, DDP x2, FSDP2 x2, TP x2, PP x2} x {fp32, bf16} x {checkpointed or not}; two
processes talk by gloo. In each cell the same model trains twice from the same weights, watched and
bare, one step of either in turn. Columns:

- ``difference``: largest difference of a signal of the first sample from that of one process in
  float64 with the same weights, over the largest value of the signal; ``heads``: every layer has
  the names and the number of heads of the whole model, and each head's score is its own.
- ``told``: what ``issues.jsonl`` of rank 0 says first of a fault on the last rank, and the first alarm:
  a head whose W_q doubles at each step and is NaN at the last one (plain, compile, TP, PP), or a NaN
  in the batch of that rank (DDP; FSDP2, where it is in the gradients of all ranks at once).
- ``cost``: median time of five watched steps, of which one is sampled, over that of five bare ones.
- ``breaks``: graph breaks that watching adds; ``collectives`` of a sampled step.
- ``neutral``: all weights are the same to the bit before the fault, watched and bare.

Exit status 1 where a cell is wrong: ``heads``, ``told``, ``breaks`` or ``neutral``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stabmon
from tests.support.small_runs import HEADS, lines
from tests.support.two_ranks import (
    Block,
    grow_head,
    inputs,
    loss_of,
    on_ranks,
    pipeline,
    split_heads,
    stage_of,
    whole,
)

WAYS = ("plain", "compile", "DDP x2", "FSDP2 x2", "TP x2", "PP x2")
EVERY, BLOCKS = 5, 4
"""Steps of a block, of which one is sampled, and blocks before the fault."""
HEALTHY_STEPS, FAULT_STEPS = 5, 11
RATE, SECONDS = 1e-3, 420
"""Learning rate, and longest time of all cells of two processes."""
_LOST = "not run: a rank hung or died before, or time was over"
LAYERS = [f"{at}.attn" for at in range(4)]
HEAD = HEADS - 1


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    way: str
    bf16: bool
    checkpointed: bool

    @property
    def name(self) -> str:
        """Its name in the table."""
        kind = "bf16" if self.bf16 else "fp32"
        return f"{self.way}, {kind}" + (", checkpointed" if self.checkpointed else "")


@dataclass
class Found:
    """What a cell gave."""

    difference: float = float("nan")
    heads: bool = False
    told: str = "none"
    cost: float = float("nan")
    breaks: int = 0
    collectives: float = 0.0
    neutral: bool = False
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Return whether nothing is wrong."""
        return self.heads and self.neutral and self.told != "none" and not self.breaks


class Checkpointed(Block):
    """A block that is computed again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def made(cell: Cell) -> nn.Sequential:
    """Return the whole model; each head of each layer has another size of scores."""
    model = whole()
    for layer, block in enumerate(model):
        if cell.checkpointed:
            block.__class__ = Checkpointed
        for head in range(HEADS):
            grow_head(block.attn.q.weight, head, 1 + 0.5 * head + 0.1 * layer)
    if cell.bf16:
        model = model.to(torch.bfloat16)
    return model.train()


@dataclass
class Trained:
    """A model in a cell's way of training."""

    module: nn.Module
    """The module that is watched."""
    step: Callable[[Tensor, Tensor], Tensor | None]
    """Forward and backward; returns the loss where it is known."""
    own: nn.Module
    """The module whose parameters are trained."""


def trained(cell: Cell, rank: int) -> Trained:
    """Set a model up for a cell."""
    model = made(cell)
    called: Any = model
    if cell.way == "compile":
        called = torch.compile(model, backend="aot_eager")
    elif cell.way == "DDP x2":
        called = DistributedDataParallel(model)
    elif cell.way == "FSDP2 x2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kept = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
        options = kept if cell.bf16 else {}
        model = model.float()
        for block in model:
            fully_shard(block, **options)
        called = fully_shard(model, **options)
    elif cell.way == "TP x2":
        split_heads(model)
    elif cell.way == "PP x2":
        part = stage_of(model, rank, apart=True).train()
        return Trained(part, pipeline(part, rank), part)

    def step(x: Tensor, target: Tensor) -> Tensor:
        loss = loss_of(called(x).float(), target.float())
        loss.backward()
        return loss.detach()

    return Trained(called, step, model)


def batch(cell: Cell, rank: int, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank's part of a batch."""
    if cell.way in ("DDP x2", "FSDP2 x2"):
        x, target = x[rank::2], target[rank::2]
    kind = torch.bfloat16 if cell.bf16 else torch.float32
    return x.to(kind), target.to(kind)


def expected(cell: Cell) -> dict[str, dict[str, np.ndarray]]:
    """Return the readings of the first sample, of one process in float64."""
    plain = Cell("plain", cell.bf16, checkpointed=False)
    model = made(plain).double()
    x, target = (each.double() for each in batch(plain, 0, *inputs(EVERY)[-1]))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    options: dict[str, Any] = {"sinks": [], "log_every": 1}
    with stabmon.AttentionStabilityMonitor(model, optimizer, **options) as monitor:
        loss = loss_of(model(x), target)
        loss.backward()
        optimizer.step()
        diagnosis = monitor.on_step(loss)
    assert diagnosis is not None
    return {layer: dict(signals) for layer, signals in diagnosis.stats.items()}


def compared(found: Any, cell: Cell) -> tuple[float, bool]:
    """Return the largest difference from one process, and whether heads have their numbers."""
    wanted, worst = expected(cell), 0.0
    names = list(wanted)
    if cell.way == "PP x2":
        names = [f"stage{at // 2}.{at % 2}.attn" for at in range(4)]
    if list(found) != names:
        return float("nan"), False
    right = True
    for name, signals in zip(names, wanted.values(), strict=True):
        for signal, values in signals.items():
            if signal == "precision_bits":  # of the number format
                continue
            now = found[name].get(signal, np.zeros(0))
            if now.shape != values.shape:
                return float("nan"), False
            scale = float(np.nanmax(np.abs(values))) or 1.0
            worst = max(worst, float(np.nanmax(np.abs(now - values))) / scale)
        scores = found[name]["max_logit"]
        right &= bool((np.abs(scores / signals["max_logit"] - 1) < 0.1).all())
    return worst, right


def run(cell: Cell, rank: int, folder: str) -> Found:
    """Train a cell watched and bare, then with a fault."""
    found = Found()
    watched, bare = trained(cell, rank), trained(cell, rank)
    both = [watched, bare]
    optimizers = [torch.optim.AdamW(each.own.parameters(), 1e-3, foreach=False) for each in both]
    monitor = watch(watched.module, optimizers[0], folder, EVERY)
    times: list[list[float]] = [[], []]
    breaks = [0, 0]
    after_first = 0

    def one(at: int, x: Tensor, target: Tensor) -> Any:
        begun, before = time.perf_counter(), graph_breaks()
        loss = both[at].step(x, target)
        optimizers[at].step()
        optimizers[at].zero_grad()
        diagnosis = monitor.on_step(loss) if at == 0 else None
        times[at].append(time.perf_counter() - begun)
        breaks[at] += graph_breaks() - before
        return diagnosis

    steps = EVERY * (1 + BLOCKS)
    data = [batch(cell, rank, *each) for each in inputs(steps + HEALTHY_STEPS + FAULT_STEPS)]
    for step, (x, target) in enumerate(data[:steps], start=1):
        for group in [group for each in optimizers for group in each.param_groups]:
            group["lr"] = RATE if step > EVERY else 0.0  # the first sample is of the first weights
        diagnosis = one(0, x, target)
        one(1, x, target)
        if step == EVERY:
            assert diagnosis is not None
            found.difference, found.heads = compared(diagnosis.stats, cell)
            after_first = 0 if monitor._ranks is None else monitor._ranks.collectives
    if monitor._ranks is not None:
        found.collectives = (monitor._ranks.collectives - after_first) / BLOCKS
    blocks = [
        [sum(own[EVERY * at : EVERY * (at + 1)]) for at in range(1, BLOCKS + 1)] for own in times
    ]
    found.cost = statistics.median(blocks[0]) / statistics.median(blocks[1])
    found.breaks = breaks[0] - breaks[1]
    pairs = zip(watched.own.parameters(), bare.own.parameters(), strict=True)
    found.neutral = all(torch.equal(local(a), local(b)) for a, b in pairs)
    errors = Counter(monitor.errors)
    monitor.close()
    monitor = watch(watched.module, optimizers[0], folder, 1)
    for number, (x, target) in enumerate(data[steps:], start=1 - HEALTHY_STEPS):
        if number > 0:
            plant(cell, rank, watched.own, x if number == FAULT_STEPS else None)
        one(0, x, target)
    found.errors = dict(errors + Counter(monitor.errors))
    monitor.close()
    if rank == 0:
        found.told = told_of(Path(folder), cell)
    return found


def watch(module: nn.Module, optimizer: Any, folder: str, every: int) -> Any:
    """Return a monitor that samples each step of a number."""
    return stabmon.AttentionStabilityMonitor(
        module,
        optimizer,
        sinks=["jsonl"],
        run_dir=folder,
        log_every=every,
        reduce_ranks=dist.is_initialized(),
        schedule="fixed",
        max_overhead=1.0,
    )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a parameter."""
    part = getattr(tensor, "to_local", lambda: tensor)().detach()
    return torch.as_tensor(part)


def plant(cell: Cell, rank: int, model: nn.Module, last: Tensor | None) -> None:
    """Plant the fault of a cell on its last rank."""
    if cell.way in ("DDP x2", "FSDP2 x2"):
        if rank == 1 and last is not None:
            last[0, 0, 0] = float("nan")
        return
    if rank < (1 if "x2" in cell.way else 0):
        return
    blocks: Any = list(model.children())
    weight = local(blocks[-1].attn.q.weight)
    of = HEADS // 2 if cell.way == "TP x2" else HEADS
    grow_head(weight, of - 1, 2.0 if last is None else float("nan"), of=of)


def told_of(folder: Path, cell: Cell) -> str:
    """Return what the disk of rank 0 says of the fault at its place; "none" without an alarm."""
    stored = lines(folder / "stabmon" / "issues.jsonl")
    alarms = [each for each in stored if each["severity"] in ("error", "critical")]
    if cell.way in ("DDP x2", "FSDP2 x2"):
        told = [each for each in alarms if "rank 1" in json.dumps(each["evidence"])]
        if told:
            return f"{told[0]['issue_type']} (rank 1)"
        return f"{alarms[0]['issue_type']} (no rank named)" if alarms else "none"
    layer = "stage1.1.attn" if cell.way == "PP x2" else LAYERS[-1]
    of_head = [e for e in stored if e["head"] is not None and e["issue_type"] != "non_finite"]
    places = {(each["layer"], each["head"]) for each in of_head}
    told = [each for each in alarms if str(each["layer"]).startswith(layer)]
    if not told or places != {(layer, HEAD)}:
        return "none"
    return f"{of_head[0]['issue_type']} of {layer} head {HEAD}, {told[0]['issue_type']}"


def graph_breaks() -> int:
    """Return the graph breaks of torch.compile so far."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def contained(cell: Cell, rank: int, folder: str) -> Found | str:
    """Run a cell; return the reason where it cannot be run."""
    logging.getLogger("stabmon").setLevel(logging.ERROR)
    torch._dynamo.reset()
    try:
        return run(cell, rank, folder)
    except Exception as error:
        return f"not run: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def over_ranks(rank: int, folder: str) -> None:
    """Run the cells of two processes that are listed beside the folder; leave a file of each."""
    named = json.loads((Path(folder).parent / "cells.json").read_text())
    for cell in cells():
        if cell.name in named:
            own = Path(folder, cell.name)
            own.mkdir(exist_ok=True)
            torch.save(contained(cell, rank, str(own)), own / f"found-{rank}")
            dist.barrier()


def cells() -> Iterator[Cell]:
    """Return every cell."""
    for way in WAYS:
        for bf16 in (False, True):
            for checkpointed in (False, True):
                yield Cell(way, bf16, checkpointed)


def results(chosen: list[Cell]) -> Iterator[tuple[Cell, Found | str]]:
    """Yield what each cell gave, those of one process first."""
    with tempfile.TemporaryDirectory() as folder:
        for cell in chosen:
            if "x2" not in cell.way:
                yield cell, contained(cell, 0, str(Path(folder, cell.name)))
        spread = [cell for cell in chosen if "x2" in cell.way]
        if not spread:
            return
        Path(folder, "cells.json").write_text(json.dumps([cell.name for cell in spread]))
        with contextlib.suppress(AssertionError):  # of a rank that hung or died
            on_ranks([over_ranks], Path(folder), seconds=SECONDS)
        for cell in spread:
            first, second = (
                torch.load(each, weights_only=False) if each.exists() else _LOST
                for each in (
                    Path(folder, over_ranks.__name__, cell.name, f"found-{rank}")
                    for rank in range(2)
                )
            )
            if isinstance(first, Found) and isinstance(second, Found):
                first.neutral = first.neutral and second.neutral
                first.heads = first.heads and second.heads
            yield cell, first if not isinstance(second, str) else second


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cells", action="append", default=[], help="cells whose name holds each of these words"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        cell
        for cell in cells()
        if not given.cells
        or any(all(w.strip() in cell.name for w in each.split(",")) for each in given.cells)
    ]
    heads = ("cell", "difference", "heads", "cost", "breaks", "collectives", "neutral", "told")
    print("{:<30}{:>11}{:>7}{:>7}{:>8}{:>13}{:>9}  {}".format(*heads))
    wrong, begun = 0, time.perf_counter()
    for cell, found in results(chosen):
        if isinstance(found, str):
            print(f"{cell.name:<30}{found}", flush=True)
            continue
        wrong += not found.is_right
        failed = f"; failed inside: {found.errors}" if found.errors else ""
        print(
            f"{cell.name:<30}{found.difference:>11.1e}{_said(found.heads):>7}{found.cost:>7.2f}"
            f"{found.breaks:>8}{found.collectives:>13.1f}{_said(found.neutral):>9}  "
            f"{found.told}{failed}",
            flush=True,
        )
    print(f"{wrong} of {len(chosen)} cells wrong; {time.perf_counter() - begun:.0f} s")
    return int(wrong > 0)


def _said(right: bool) -> str:
    return "right" if right else "WRONG"


if __name__ == "__main__":
    sys.exit(main())
