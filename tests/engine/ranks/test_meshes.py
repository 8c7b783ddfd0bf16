"""Check on four gloo ranks, a mesh of two dimensions, that readings are those of one process: shards
of weights beside shards of heads, within stages of a pipeline, and beside replicas. (Of torch itself
DistributedDataParallel fails within a pipeline's stages: an internal assertion of its reducer.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from stabmon.interventions.qk_clip import QkClip
from stabmon.records import StabilityIssue
from tests.engine.ranks.test_global_identity import (
    HEAD,
    LAYERS,
    STAGES,
    STEPS,
    optimizer_of,
    plain_step,
    same_as,
    single,
    watch,
)
from tests.support.small_runs import lines
from tests.support.two_ranks import (
    given_by,
    inputs,
    on_ranks,
    pipeline,
    split_heads,
    stage_of,
    whole,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]
RANKS = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Every scenario below in the same four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(SCENARIOS, folder, seconds=300, count=RANKS)
    return lambda scenario: (given_by(scenario, folder, RANKS), folder / scenario.__name__)


def mesh_of(*names):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(step, model, folder, replica, parts=2):
    """Train on a part of each batch; return the last reading and errors."""
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, folder)
    for x, target in inputs(STEPS):
        loss = step(*(each.chunk(parts)[replica] for each in (x, target)))
        optimizer.step()
        optimizer.zero_grad()
        diagnosis = monitor.on_step(loss)
    monitor.close()
    return diagnosis.readings[-1], dict(monitor.errors)


def shards_of_heads(rank, folder):
    mesh = mesh_of("data", "heads")
    model = whole(2).train()
    split_heads(model, mesh=mesh["heads"])
    model = shard(model, mesh["data"])
    return train(plain_step(model), model, folder, mesh["data"].get_local_rank())


def clip_of_shards(rank, folder):
    """Clip the last head, which is sharded and on the ranks of one row of the mesh alone."""
    mesh = mesh_of("data", "heads")
    model = whole(2).train()
    split_heads(model, mesh=mesh["heads"])
    model = shard(model, mesh["data"])
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, folder, "guard")
    for x, target in inputs(STEPS):
        loss = plain_step(model)(*(each.chunk(2)[rank // 2] for each in (x, target)))
        optimizer.step()
        optimizer.zero_grad()
        monitor.on_step(loss)
    issue = StabilityIssue(STEPS, "1.attn", HEAD, "logit_growth", "error", 9.0, 1.0, "")
    before = whole_weights(model)
    applied = monitor.apply(replace(QkClip(target=0.01, hold=False), issues=(issue,)))
    after = whole_weights(model)
    restored = applied is not None and applied.undo()
    undone, errors, state = whole_weights(model), dict(monitor.errors), monitor._ranks.state
    monitor.close()
    return before, after, undone, restored, errors, state


def whole_weights(model):
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in model.named_parameters()
    }


def shards_in_stages(rank, folder):
    mesh = mesh_of("stage", "data")
    stage, replica = (mesh[name].get_local_rank() for name in ("stage", "data"))
    module = shard(stage_of(whole(2), stage, apart=True).train(), mesh["data"])
    step = pipeline(module, stage, mesh["stage"].get_group())
    return train(step, module, folder, replica)


def shards_and_replicas(rank, folder):
    """Hybrid sharding: each of the four ranks has rows of its own."""
    model = shard(whole(2).train(), mesh_of("replicas", "shards"))
    return train(plain_step(model), model, folder, rank, parts=RANKS)


SCENARIOS = [shards_of_heads, clip_of_shards, shards_in_stages, shards_and_replicas]


@pytest.mark.parametrize(
    ("scenario", "named"),
    [(shards_of_heads, LAYERS), (shards_in_stages, STAGES), (shards_and_replicas, LAYERS)],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_readings_over_two_dimensions_are_those_of_one_process(ranks, scenario, named):
    given, folder = ranks(scenario)
    for reading, errors in given:
        assert errors == {}
        same_as(reading, single(), named)
    assert [list(each["layers"]) for each in lines(folder / "stabmon" / "readings.jsonl")] == [
        named
    ] * STEPS


def test_a_clip_scales_one_head_of_shards_and_is_undone_to_the_bit(ranks):
    given, _ = ranks(clip_of_shards)
    wanted = {f"1.attn.{part}.{kind}" for part in "qk" for kind in ("weight", "bias")}
    for before, after, undone, restored, errors, state in given:
        assert (restored, errors, state) == (True, {}, "together")
        assert {name for name in before if not torch.equal(before[name], after[name])} == wanted
        assert all(torch.equal(before[name], undone[name]) for name in before)
        for name in wanted:
            rows = (before[name] != after[name]).reshape(4, 8, -1).any(-1).any(-1)
            assert rows.tolist() == [False, False, False, True]
