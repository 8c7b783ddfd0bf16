"""Two processes that talk by gloo: what they report together, and that neither is ever left
waiting.
"""

from __future__ import annotations

import json
import math
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stabmon
from stabmon._torch.process_group import rank, world_size
from stabmon._torch.ranks.exchange import RankExchange, announce
from stabmon.engine.rank_reducer import RankReducer
from stabmon.engine.ranks import findings
from stabmon.engine.sampling import overhead
from stabmon.records import NonFinite
from tests.support.small_runs import (
    batches,
    gpt2,
    lines,
    llama,
    optimizer_of,
    same_readings,
    train,
    weights,
)
from tests.support.two_ranks import given_by, on_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Runs every scenario below in one pair of processes; gives a function from a scenario to (what
    each rank gave, its folder).
    """
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(SCENARIOS, folder, seconds=240)
    return lambda scenario: (given_by(scenario, folder), folder / scenario.__name__)


def watch(model, optimizer, folder=None, **options):
    given = {"sinks": ["jsonl"], "log_every": 2, "reduce_ranks": True, "run_dir": folder} | options
    return stabmon.AttentionStabilityMonitor(model, optimizer, config="observe", **given)


def parallel(model):
    """Half of each batch on either rank, with what makes replays dangerous: buffers that DDP
    broadcasts.
    """
    model.register_buffer("counted", torch.zeros(3))
    return DistributedDataParallel(model, broadcast_buffers=True)


def train_in_parallel(rank, folder):
    results = {}
    for watched in (False, True):
        model = gpt2()
        ddp = parallel(model)
        optimizer = optimizer_of(model)
        monitor = watch(ddp, optimizer, folder, schedule="fixed") if watched else None
        data = [tokens[rank::2] for tokens in batches(4, rows=8)]
        given = train(model, monitor, optimizer, data, called=ddp)
        results[watched] = weights(model)
    monitor.close()
    return [each and each.readings[-1] for each in given], results, dict(monitor.errors)


def test_readings_are_those_of_the_whole_batch_and_gradients_are_unchanged(ranks):
    given, folder = ranks(train_in_parallel)
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=2)
    whole = train(model, monitor, optimizer, batches(4, rows=8))
    monitor.close()
    for readings, results, errors in given:
        assert errors == {}
        assert [bool(each) for each in readings] == [False, True, False, True]
        assert all(same_readings(readings[i].layers, whole[i].stats, 1e-4) for i in (1, 3))
        assert readings[1].gradients[""] == pytest.approx(
            whole[1].readings[-1].gradients[""], rel=1e-3
        )
        assert all(torch.equal(results[False][name], results[True][name]) for name in results[True])
    assert same_readings(given[0][0][1].layers, given[1][0][1].layers)
    assert [each["step"] for each in lines(folder / "stabmon" / "readings.jsonl")] == [2, 4]


def train_with_faults(rank, folder):
    """Measuring fails on rank 1 at the first and the third sample."""
    model = gpt2()
    ddp = parallel(model)
    optimizer = optimizer_of(model)
    monitor = watch(ddp, optimizer, log_every=1, sinks=[])
    measured, samples = monitor._observer.measurements.add, []

    def fails(call):
        if rank == 1 and monitor.step in (0, 2):
            raise MemoryError("planted")
        measured(call)

    monitor._observer.measurements.add = fails
    for tokens in batches(4, rows=8):
        samples += train(model, monitor, optimizer, [tokens[rank::2]], called=ddp)
    monitor.close()
    return [each.stats for each in samples], dict(monitor.errors)


def test_a_rank_whose_measuring_fails_holds_up_nobody(ranks):
    ((first, errors), (second, errors_there)), _ = ranks(train_with_faults)
    assert errors == {}
    assert errors_there == {"capture": 4}
    assert [bool(each) for each in first] == [True] * 4
    assert [bool(each) for each in second] == [False, True, False, True]
    assert same_readings(first[1], second[1])
    assert same_readings(first[3], second[3])


def train_into_a_nan(rank, folder):
    """The second rank's batch holds a token whose embedding is NaN there alone; DDP spreads it."""
    model = gpt2()
    ddp = parallel(model)
    optimizer = optimizer_of(model)
    monitor = watch(ddp, optimizer, folder, log_every=50)
    given = []
    for step, tokens in enumerate(batches(6, rows=8), start=1):
        if step == 3 and rank == 1:
            with torch.no_grad():
                model.transformer.h[1].attn.c_attn.weight[0, 8] = math.nan
        given += train(model, monitor, optimizer, [tokens[rank::2]], called=ddp)
    monitor.close()
    return [issue for each in given if each for issue in each.issues], dict(monitor.errors)


def test_a_nan_on_another_rank_is_named_by_the_one_that_writes(ranks):
    ((issues, errors), (_, errors_there)), folder = ranks(train_into_a_nan)
    assert errors == errors_there == {}
    (issue,) = issues
    assert (issue.step, issue.layer, issue.head) == (3, "transformer.h.1.attn.c_attn", 1)
    assert issue.evidence["detail"].endswith("(rank 1)")
    assert [each["step"] for each in lines(folder / "stabmon" / "issues.jsonl")] == [3]


def share_alone(rank, folder):
    findings._WAIT = timedelta(seconds=1)  # from here on in this process
    reducer = RankReducer(nn.Linear(2, 2), RankExchange(), 50)
    found = NonFinite(3, "gradient", None, None, "all gradients", "9 of 9")
    began = time.perf_counter()
    shared = reducer.share(found, 3) if rank == 0 else None
    return shared, time.perf_counter() - began


def test_a_finding_that_no_other_rank_has_is_waited_for_in_vain_but_not_long(ranks):
    ((shared, seconds), _), _ = ranks(share_alone)
    assert shared.tensor == "all gradients"
    assert 0.9 < seconds < 20


def train_fully_sharded(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = gpt2()
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, folder, log_every=2)
    given = []
    for step, tokens in enumerate(batches(5, rows=8), start=1):
        if step == 5 and rank == 1:
            weight = model.transformer.h[1].mlp.c_fc.weight.to_local()
            with torch.no_grad():
                weight[0, 0] = math.nan
        given += train(model, monitor, optimizer, [tokens[rank::2]], called=model)
    monitor.close()
    return (
        [each and each.stats for each in given],
        [issue for each in given if each for issue in each.issues],
        dict(monitor.errors),
        given[1].readings[-1],
    )


def test_fully_sharded_models_are_read_and_hang_nowhere(ranks):
    given, _ = ranks(train_fully_sharded)
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=2)
    whole = train(model, monitor, optimizer, batches(2, rows=8))
    monitor.close()
    for stats, issues, errors, reading in given:
        same_norms(reading, whole[1].readings[-1])
        assert errors == {}
        assert list(stats[1]) == ["transformer.h.0.attn", "transformer.h.1.attn"]
        assert same_readings(stats[1], whole[1].stats, 1e-3)
        assert [issue.step for issue in issues] == [5]


def same_norms(reading, whole):
    """The norms of gradients and of W_q and W_k are those of one process."""
    assert reading.gradients.keys() == whole.gradients.keys()
    assert len(reading.gradients) == 3
    for layer, norm in whole.gradients.items():
        assert reading.gradients[layer] == pytest.approx(norm, rel=1e-3)
    assert reading.query_key.keys() == whole.query_key.keys()
    assert len(reading.query_key) == 2
    for layer, moved in whole.query_key.items():
        assert reading.query_key[layer].to_dict() == pytest.approx(moved.to_dict(), rel=1e-3)


PARTS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}


def train_tensor_parallel(rank, folder):
    """Both ranks see the whole batches, and each has half of the heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    model = llama()
    styles = (parallel.ColwiseParallel, parallel.RowwiseParallel)
    plan = {f"self_attn.{name}": styles[dim]() for name, dim in PARTS.items()}
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("heads",))
    for layer in model.model.layers:
        parallel.parallelize_module(layer, mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
    monitor = watch(model, optimizer, folder, schedule="fixed")
    given = train(model, monitor, optimizer, batches(2, rows=4), clip=None)
    monitor.close()
    return given[1].readings[-1], dict(monitor.errors)


def test_under_tensor_parallelism_norms_are_those_of_whole_weights(ranks):
    given, _ = ranks(train_tensor_parallel)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
    with stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=2) as monitor:
        whole = train(model, monitor, optimizer, batches(2, rows=4), clip=None)[1].readings[-1]
    for reading, errors in given:
        assert errors == {}
        same_norms(reading, whole)


def train_sharded_alone(rank, folder):
    """A monitor that adds nothing up over ranks cannot know norms of shards, and says so."""
    from torch.distributed.fsdp import fully_shard

    model = gpt2()
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, folder, reduce_ranks=False, log_every=1)
    given = train(model, monitor, optimizer, batches(4, rows=4))
    monitor.close()
    return given[3].readings[-1], dict(monitor.errors)


def test_norms_of_shards_that_no_rank_adds_up_are_said_to_be_unwatched(ranks):
    given, folder = ranks(train_sharded_alone)
    for reading, errors in given:
        assert errors == {}
        assert reading.gradients == reading.query_key == {}
    unwatched = json.loads((folder / "stabmon" / "meta.json").read_text())["unwatched"]
    assert unwatched.keys() == {"gradients", "query_key"}
    assert all("reduce_ranks=True" in words for words in unwatched.values())
    assert "gradient_explosion, gradient_vanishing cannot fire" in unwatched["gradients"]


def start_callbacks(rank, folder):
    """On rank 1 the callback cannot start."""
    from transformers import Trainer, TrainingArguments

    from stabmon.integrations import transformers
    from tests.support.small_runs import Tokens

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    if rank == 1:
        transformers.AttentionStabilityMonitor = lambda *_, **__: 1 / 0
    callback = transformers.StabilityCallback("observe", log_every=2, sinks=["jsonl"])
    arguments = TrainingArguments(
        folder + "/out",
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(gpt2(), arguments, train_dataset=Tokens(), callbacks=[callback])
    trainer.train()
    return callback.monitor is not None and [
        reading.step for reading in callback.monitor._tracker.history.readings
    ]


def test_where_one_rank_cannot_start_watching_the_others_report_alone(ranks):
    steps, folder = ranks(start_callbacks)
    assert steps == [[1, 2, 3, 4], False]
    readings = lines(folder / "out" / "stabmon" / "readings.jsonl")
    assert [each["step"] for each in readings] == [1, 2, 3, 4]


def train_under_guard(rank, folder):
    """Both ranks spoil the first layer after step 4, each on its own half of each batch; the second
    time without telling each other.
    """
    outcomes = []
    for together in (True, False):
        model = gpt2()
        ddp = parallel(model)
        optimizer = optimizer_of(model, 1e-3)
        monitor = stabmon.AttentionStabilityMonitor(
            ddp,
            optimizer,
            config="guard",
            sinks=["jsonl"],
            log_every=1,
            reduce_ranks=together,
            run_dir=f"{folder}/{together}",
        )
        for step in range(1, 9):
            tokens = torch.randint(3, 32, (8, 48), generator=torch.Generator().manual_seed(step))[
                rank::2
            ]
            optimizer.zero_grad()
            loss = ddp(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            if step == 4:
                with torch.no_grad():
                    model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(60.0)
            monitor.on_step(loss=loss)
        monitor.close()
        acts = [(each.intervention.name, each.step) for each in monitor.applied]
        outcomes.append((acts, weights(model), dict(monitor.errors)))
    return outcomes


def test_under_guard_all_ranks_do_the_same_and_none_acts_alone(ranks):
    (first, second), folder = ranks(train_under_guard)
    for (acts, bits, errors), (acts_there, bits_there, errors_there) in zip(
        first, second, strict=True
    ):
        assert errors == errors_there == {}
        assert acts == acts_there
        assert all(torch.equal(bits[name], bits_there[name]) for name in bits)
    assert ("qk_clip", 5) in first[0][0]
    assert first[1][0] == []
    audit = lines(folder / "True" / "stabmon" / "interventions.jsonl")
    assert [
        each["step"]
        for each in audit
        if each["intervention"] == "qk_clip" and each["action"] == "applied"
    ] == [5]


def train_adaptively(rank, folder):
    """Each rank has losses and a speed of its own: the second's loss leaps after step 30, then it
    measures slowly. Gives the sampled steps of a run of each kind.
    """
    sampled = {}
    for what in ("calm", "leaps", "slow"):
        overhead.FREE_SAMPLES = 10 if what == "slow" else 1000
        model = gpt2()
        ddp = parallel(model)
        optimizer = optimizer_of(model, 1e-5)
        monitor = watch(ddp, optimizer, sinks=[], log_every=20, max_overhead=0.05)
        measured = monitor._observer.measurements.add

        def add(call, measured=measured, what=what):
            time.sleep(0.01 * rank * (what == "slow"))
            measured(call)

        monitor._observer.measurements.add = add
        sampled[what] = []
        for step, tokens in enumerate(batches(60, rows=2), start=1):
            optimizer.zero_grad()
            ddp(input_ids=tokens[rank::2], labels=tokens[rank::2]).loss.backward()
            optimizer.step()
            leapt = what == "leaps" and rank == 1 and step > 30
            diagnosis = monitor.on_step(3.0 + 0.01 * (step % 3) + 50.0 * leapt)
            if diagnosis is not None and diagnosis.readings[-1].sampled:
                sampled[what].append(step)
        monitor.close()
        assert not monitor.errors, monitor.errors
    overhead.FREE_SAMPLES = 128
    return sampled


def test_ranks_of_other_losses_and_speeds_sample_the_same_steps(ranks):
    (first, second), _ = ranks(train_adaptively)
    assert first == second
    assert first["calm"][:8] == list(range(1, 9))
    assert {20, 40, 60} <= set(first["calm"])
    calm, leaps, slow = (
        [step for step in first[what] if step > 30] for what in ("calm", "leaps", "slow")
    )
    assert (
        len(leaps) > len(calm) > len(slow)
    )  # one rank's loss, and one rank's speed, count for both


def train_on_noise(rank, folder):
    """From step 90 on, the second rank's loss is that of noise, the first's is as before."""
    model = gpt2()
    ddp = parallel(model)
    optimizer = optimizer_of(model, 1e-6)
    monitor = watch(ddp, optimizer, folder, log_every=10, schedule="fixed", signals=["max_logit"])
    data = batches(2, rows=2)
    for step in range(1, 141):
        optimizer.zero_grad()
        ddp(input_ids=data[0][rank::2], labels=data[0][rank::2]).loss.backward()
        optimizer.step()
        noise = 0.03 * ((7 * step) % 5)
        monitor.on_step(3.0 + noise + 0.35 * (rank == 1 and step >= 90))
    monitor.close()
    readings = monitor._tracker.history.readings
    return readings[-1].losses[-1], readings[-1].rank_losses[-1], dict(monitor.errors)


def test_a_rank_whose_data_turned_to_noise_is_named_on_disk(ranks):
    given, folder = ranks(train_on_noise)
    for (_, mean), (_, largest, number), errors in given:
        assert errors == {}
        assert (number, largest - mean) == (1, pytest.approx(0.175, abs=1e-5))
    issues = lines(folder / "stabmon" / "issues.jsonl")
    spikes = [each for each in issues if each["issue_type"] == "loss_spike"]
    assert any(each["severity"] == "error" and each["evidence"]["rank"] == 1 for each in spikes)


def resume_on_one(rank, folder):
    """Only the first rank finds a state of step 8."""
    model = gpt2()
    ddp = parallel(model)
    optimizer = optimizer_of(model)
    monitor = watch(ddp, optimizer, sinks=[], log_every=4)
    state = train_state() if rank == 0 else None
    began = time.perf_counter()
    if state is not None:
        monitor.load_state_dict(state)
    given = train(model, monitor, optimizer, [t[rank::2] for t in batches(2, rows=8)], called=ddp)
    monitor.close()
    readings = [each is not None for each in given], monitor.step
    return readings, dict(monitor.errors), time.perf_counter() - began


def train_state():
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=4)
    train(model, monitor, optimizer, batches(8, rows=2))
    monitor.close()
    return monitor.state_dict()


def test_a_state_that_only_some_ranks_find_is_used_by_none(ranks):
    given, _ = ranks(resume_on_one)
    for readings, errors, seconds in given:
        assert errors == {}
        assert readings == ([True, True], 2)
        assert seconds < 12  # nobody has waited for a timeout


SCENARIOS = (
    resume_on_one,
    train_on_noise,
    train_adaptively,
    train_in_parallel,
    train_with_faults,
    train_into_a_nan,
    share_alone,
    train_fully_sharded,
    train_tensor_parallel,
    train_sharded_alone,
    train_under_guard,
    start_callbacks,
)


def test_one_process_alone_is_rank_0_of_1_and_hears_nobody():
    assert (rank(), world_size()) == (0, 1)
    assert announce("a subject", "mine") == ["mine"]
    reducer = RankReducer(nn.Linear(2, 2), RankExchange(), 50)
    assert not reducer.active
    found = NonFinite(3, "loss", None, None, "loss")
    assert reducer.share(found, 3) is found
