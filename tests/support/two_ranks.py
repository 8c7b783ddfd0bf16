"""Small models over gloo ranks, two unless more are asked for: stages of a pipeline, shards of heads, and runs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.small_runs import HEADS, Attention

WIDTH, MICRO_BATCHES = 32, 2
PRELOADED = (
    "stabmon.engine.monitor",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""Modules that all ranks of a session of tests import once, before they are forked."""


class SplitAttention(Attention):
    """Attention with as many heads as the features here make."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention after a norm, on a residual stream ``[B, S, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), SplitAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def whole(blocks: int = 4) -> nn.Sequential:
    """Blocks one after the other, of the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def inputs(steps: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets ``[rows, 12, 32]`` of each step."""
    made = torch.Generator().manual_seed(3)
    shape = (rows, 12, WIDTH)
    return [
        (torch.randn(shape, generator=made), torch.randn(shape, generator=made))
        for _ in range(steps)
    ]


def loss_of(given: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return (given - target).square().mean()


def stage_of(model: nn.Sequential, rank: int, *, apart: bool) -> nn.Module:
    """Return half of the blocks.

    Args:
        model: the whole model.
        rank: 0 for the first half.
        apart: each half names its blocks from 0; else they keep the names of the whole.
    """
    half = len(model) // 2
    blocks = {str(at): model[at] for at in range(rank * half, (rank + 1) * half)}
    if apart:
        return nn.Sequential(*blocks.values())
    kept = nn.Sequential()
    for name, block in blocks.items():
        kept.add_module(name, block)
    return kept


def pipeline(
    module: nn.Module, rank: int, group: dist.ProcessGroup | None = None, **options: Any
) -> Callable[[Tensor, Tensor], Tensor | None]:
    """Return a training step of a pipeline of two stages and ``MICRO_BATCHES`` micro-batches.

    It returns the loss on the last stage, None on the first.

    Args:
        module: this rank's stage.
        rank: of this stage, 0 or 1.
        group: the two stages' processes; None for all.
        **options: of the schedule.
    """
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(module, rank, 2, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=loss_of, **options)

    def step(x: Tensor, target: Tensor) -> Tensor | None:
        if rank == 0:
            schedule.step(x)
            return None
        losses: list[Tensor] = []
        schedule.step(target=target, losses=losses)
        return torch.stack(losses).mean().detach()

    return step


def split_heads(model: nn.Module, dim: str = "heads", mesh: Any = None) -> None:
    """Shard the heads of every attention over the ranks of a mesh dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    mesh = mesh or init_device_mesh("cpu", (2,), mesh_dim_names=(dim,))
    plan = {name: parallel.ColwiseParallel() for name in ("q", "k", "v")}
    for block in model.children():
        attn: Any = block.attn
        parallel.parallelize_module(attn, mesh, {**plan, "o": parallel.RowwiseParallel()})


def grow_head(weight: Tensor, head: int, factor: float = 2.0, of: int = HEADS) -> None:
    """Multiply the rows of one head of W_q, a plain tensor or this rank's part of one."""
    size = weight.shape[0] // of
    with torch.no_grad():
        weight[head * size : (head + 1) * size] *= factor


def on_ranks(
    scenarios: Sequence[Callable[..., Any]],
    folder: Path,
    seconds: float | None = 150,
    wait: float = 60,
    count: int = 2,
) -> None:
    """Run each of some functions of (rank, folder) in the same processes, one a rank.

    What a rank returns lies in ``folder/<name>/given-<rank>``.

    Args:
        scenarios: module-level functions, since the processes import them.
        folder: an empty one.
        seconds: time after which a process that is left is killed; None for never.
        wait: seconds after which the process group gives up on a collective.
        count: number of ranks.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    given = (count, str(folder), tuple(scenarios), wait)
    processes = [context.Process(target=_start, args=(rank, *given)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a rank was left waiting"
    assert [process.exitcode for process in processes] == [0] * count


def _start(
    rank: int, count: int, folder: str, scenarios: Sequence[Callable[..., Any]], wait: float
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=wait),
    )
    for scenario in scenarios:
        function = getattr(scenario, "func", scenario)  # of a partial
        own = Path(folder, function.__name__)
        own.mkdir(exist_ok=True)
        torch.save(scenario(rank, str(own)), own / f"given-{rank}")
        dist.barrier()
    dist.destroy_process_group()


def given_by(scenario: Callable[..., Any], folder: Path, count: int = 2) -> list[Any]:
    """Return what each of ``count`` ranks has returned from a scenario."""
    own = folder / scenario.__name__
    return [torch.load(own / f"given-{rank}", weights_only=False) for rank in range(count)]
