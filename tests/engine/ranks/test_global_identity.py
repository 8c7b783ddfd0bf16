"""Check on two gloo ranks that layers and heads have one name in the whole run: stages of a
pipeline and shards of heads, faults planted on the last of them, and what guard does there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import stabmon
from stabmon.interventions.qk_clip import QkClip
from stabmon.records import StabilityIssue
from tests.support.small_runs import HEADS, lines, same_readings, weights
from tests.support.two_ranks import (
    MICRO_BATCHES,
    given_by,
    grow_head,
    inputs,
    loss_of,
    on_ranks,
    pipeline,
    split_heads,
    stage_of,
    whole,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

STEPS = 3
FAULT_AT, FAULT_STEPS = 6, 14
HEAD = 3
"""The head that grows, of four: the last one on the last rank."""
GROUP_AT, GROUP_STEPS = 20, 26
SENSITIVE = {"false_alarm_rate": 0.2}
"""So that heads of such a small model alarm long before they are broken for good."""
LAYERS = ["0.attn", "1.attn"]
STAGES = ["stage0.0.attn", "stage1.0.attn"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Every scenario below in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(SCENARIOS, folder)
    return lambda scenario: (given_by(scenario, folder), folder / scenario.__name__)


def watch(model, optimizer, folder=None, config="observe", **options):
    given = {"sinks": ["jsonl"], "log_every": 1, "reduce_ranks": True, "run_dir": folder}
    return stabmon.AttentionStabilityMonitor(model, optimizer, config=config, **(given | options))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), 1e-3, foreach=False)


def train(step, model, optimizer, monitor, steps, between=lambda step: None):
    """Return the diagnoses; ``step`` makes forward and backward and returns the loss or None."""
    given = []
    for at, (x, target) in enumerate(inputs(steps), start=1):
        between(at)
        loss = step(x, target)
        optimizer.step()
        optimizer.zero_grad()
        given.append(None if monitor is None else monitor.on_step(loss))
    return given


def plain_step(model):
    def step(x, target):
        loss = loss_of(model(x), target)
        loss.backward()
        return loss.detach()

    return step


def run_pipeline(
    rank,
    folder,
    *,
    apart,
    config="observe",
    steps=STEPS,
    between=lambda *_: None,
    options=None,
    **schedule,
):
    module = stage_of(whole(2), rank, apart=apart).train()
    optimizer = optimizer_of(module)
    monitor = watch(module, optimizer, folder, config, **(options or {}))
    step = pipeline(module, rank, **schedule)
    given = train(step, module, optimizer, monitor, steps, lambda at: between(at, module))
    return module, monitor, given


def pipeline_of_equal_names(rank, folder):
    module, monitor, given = run_pipeline(rank, folder, apart=True)
    readings, errors = [each.readings[-1] for each in given], dict(monitor.errors)
    monitor.close()
    bare = stage_of(whole(2), rank, apart=True).train()
    optimizer = optimizer_of(bare)
    train(pipeline(bare, rank), bare, optimizer, None, STEPS)
    return readings, errors, weights(module), weights(bare)


def pipeline_of_kept_names(rank, folder):
    _, monitor, given = run_pipeline(rank, folder, apart=False)
    monitor.close()
    return given[-1].readings[-1], dict(monitor.errors)


def single(dtype=torch.float64, steps=STEPS):
    """The last reading of one process with the whole model, in float64."""
    return each_of_single(dtype, steps)[-1]


def each_of_single(dtype=torch.float64, steps=STEPS):
    model = whole(2).to(dtype).train()
    optimizer = optimizer_of(model)
    with stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=1) as monitor:
        step = plain_step(model)
        given = []
        for x, target in inputs(steps):
            loss = step(x.to(dtype), target.to(dtype))
            optimizer.step()
            optimizer.zero_grad()
            given.append(monitor.on_step(loss).readings[-1])
        return given


def same_as(reading, expected, named):
    """The reading is that of one process, layers by other names."""
    rename = dict(zip(LAYERS, named, strict=True))
    layers = {rename[layer]: signals for layer, signals in expected.layers.items()}
    assert list(reading.layers) == named
    assert same_readings(reading.layers, layers, 2e-4)
    assert reading.loss == pytest.approx(expected.loss, rel=1e-5)
    assert reading.gradients == pytest.approx(
        {rename.get(layer, layer): norm for layer, norm in expected.gradients.items()},
        rel=1e-3,
    )
    for layer, moved in expected.query_key.items():
        found = reading.query_key[rename[layer]].to_dict()
        assert found == pytest.approx(moved.to_dict(), rel=1e-3)
    assert {layer: each.heads for layer, each in reading.info.items()} == dict.fromkeys(named, 4)


def test_stages_of_equal_names_are_read_as_one_model_and_trained_alike(ranks):
    given, folder = ranks(pipeline_of_equal_names)
    expected = each_of_single()
    for readings, errors, watched, bare in given:
        assert errors == {}
        # the first too: stages run once more before it, on uninitialised memory
        for reading, one in zip(readings, expected, strict=True):
            same_as(reading, one, STAGES)
            assert reading.micro_batches == MICRO_BATCHES
        assert all(torch.equal(watched[name], bare[name]) for name in bare)
    stored = lines(folder / "stabmon" / "readings.jsonl")
    assert [list(each["layers"]) for each in stored] == [STAGES] * STEPS


def test_stages_that_keep_their_names_are_read_under_these(ranks):
    given, _ = ranks(pipeline_of_kept_names)
    for reading, errors in given:
        assert errors == {}
        same_as(reading, single(), LAYERS)


def pipeline_that_adds_its_micro_batches(rank, folder):
    _, monitor, given = run_pipeline(rank, folder, apart=False, scale_grads=False, steps=1)
    monitor.close()
    return given[-1].readings[-1].gradients, dict(monitor.errors)


def test_gradients_that_the_schedule_does_not_divide_are_read_as_they_are(ranks):
    given, _ = ranks(pipeline_that_adds_its_micro_batches)
    expected = single(steps=1)
    for gradients, errors in given:
        assert errors == {}
        times = {layer: MICRO_BATCHES * norm for layer, norm in expected.gradients.items()}
        assert gradients == pytest.approx(times, rel=1e-3)


def fault_on_last_stage(rank, folder):
    def grow(at, module):
        if at >= FAULT_AT and rank == 1:
            grow_head(module[0].attn.q.weight, 0, of=1)
            grow_head(module[0].attn.k.weight, 0, of=1)

    module, monitor, _ = run_pipeline(
        rank,
        folder,
        apart=True,
        config="guard",
        steps=FAULT_STEPS,
        between=grow,
        options=SENSITIVE,
    )
    applied = [each.intervention.name for each in monitor.applied]
    state, errors = monitor.state_dict(), dict(monitor.errors)
    monitor.close()
    # a run that goes on from each rank's own state knows the layers of all ranks
    resumed = watch(module, optimizer_of(module), None, "guard", sinks=[])
    resumed.load_state_dict(state)
    known = resumed._tracker.history.layers, [each.active for each in resumed.applied]
    resumed.close()
    return errors, applied, known


def test_a_fault_of_the_last_stage_is_on_the_disk_of_rank_0_and_of_no_other_layer(ranks):
    given, folder = ranks(fault_on_last_stage)
    stored = lines(folder / "stabmon" / "issues.jsonl")
    alarms = [each for each in stored if each["severity"] in ("error", "critical")]
    assert alarms
    assert {(each["layer"], each["head"]) for each in alarms} == {
        ("stage1.0.attn", head) for head in range(HEADS)
    }
    for errors, applied, (layers, active) in given:
        assert errors == {}
        assert applied == given[0][1]  # the same on both ranks
        assert "qk_clip" in applied
        assert list(layers) == STAGES
        assert len(active) == len(applied)


def part_of_last_stage(rank, folder):
    """Somebody multiplies weights that make no scores in the last stage."""

    def grow(at, module):
        if at == FAULT_STEPS and rank == 1:
            with torch.no_grad():
                module[0].attn.v.weight.mul_(30)

    _, monitor, given = run_pipeline(rank, folder, apart=True, steps=FAULT_STEPS, between=grow)
    monitor.close()
    return list(given[-1].readings[-1].parts), dict(monitor.errors)


def test_weights_that_jump_in_the_last_stage_are_told_by_their_name(ranks):
    given, folder = ranks(part_of_last_stage)
    wanted = [f"stage{at}.0.{part}" for at in (0, 1) for part in ("norm", "attn")]
    for parts, errors in given:
        assert (sorted(parts), errors) == (sorted(wanted), {})
    stored = lines(folder / "stabmon" / "issues.jsonl")
    jumps = [each for each in stored if each["issue_type"] == "weight_jump"]
    assert [(each["step"], each["layer"]) for each in jumps] == [(FAULT_STEPS, "stage1.0.attn")]


def groups_of_last_stage(rank, folder):
    """The rate, and then the decay, of the last stage alone are wrong, under guard and without."""
    found = {}
    for what, config in (("lr", "observe"), ("lr", "guard"), ("weight_decay", "observe")):
        module = stage_of(whole(2), rank, apart=True).train()
        optimizer = optimizer_of(module)
        run = f"{what}-{config}"
        monitor = watch(module, optimizer, Path(folder) / run, config)

        def change(at, what=what, group=optimizer.param_groups[0]):
            if at == GROUP_AT and rank == 1:
                group[what] = {"lr": 50 * group["lr"], "weight_decay": -3.0}[what]

        given = train(pipeline(module, rank), module, optimizer, monitor, GROUP_STEPS, change)
        reading = given[-1].readings[-1]
        applied = [each.intervention.name for each in monitor.applied]
        used = reading.used_rates
        found[run] = used, reading.weight_decays, applied, dict(monitor.errors)
        monitor.close()
    return found


def test_a_rate_of_the_last_stage_alone_is_told_and_capped_and_its_decay_is_read(ranks):
    given, folder = ranks(groups_of_last_stage)
    assert given[0] == given[1]
    for run, (rates, decays, applied, errors) in given[0].items():
        assert errors == {}
        if run == "weight_decay-observe":
            assert decays == {"0.0": -3.0}
            continue
        stored = lines(folder / run / "stabmon" / "issues.jsonl")
        alarms = [each for each in stored if each["severity"] in ("error", "critical")]
        assert GROUP_AT <= alarms[0]["step"] <= GROUP_AT + 1
        assert alarms[0]["evidence"]["rates"] == {"0.0": pytest.approx(0.05)}
        if run == "lr-guard":
            assert "cap_learning_rate" in applied
            assert rates == {"0.0": pytest.approx(0.001)}
        else:
            assert rates == {"0.0": pytest.approx(0.05)}


def harmless_jump_on_last_stage(rank, folder):
    """Weights of the last stage jump under guard, and the loss does not."""

    def grow(at, module):
        if at == FAULT_AT and rank == 1:
            grow_head(module[0].attn.q.weight, HEAD, 64.0)

    _, monitor, _ = run_pipeline(
        rank, folder, apart=True, config="guard", steps=FAULT_AT, between=grow
    )
    applied = [each.intervention.name for each in monitor.applied]
    monitor.close()
    return applied


def test_a_rollback_that_would_only_cost_steps_is_refused_on_all_stages_and_says_so(ranks):
    given, folder = ranks(harmless_jump_on_last_stage)
    assert given[0] == given[1] == ["skip_step"]
    audit = lines(folder / "stabmon" / "interventions.jsonl")
    refused = [each for each in audit if each["action"] == "refused"]
    assert [each["intervention"] for each in refused] == ["rollback"]
    assert "would only cost 6 steps" in refused[0]["why"]


def clip_on_last_stage(rank, folder):
    module, monitor, _ = run_pipeline(rank, folder, apart=True, config="guard")
    before = weights(module)
    issue = StabilityIssue(STEPS, "stage1.0.attn", HEAD, "logit_growth", "error", 9.0, 1.0, "")
    clip = replace(QkClip(target=0.01, hold=False), issues=(issue,))
    applied = monitor.apply(clip)
    after, state = weights(module), monitor._ranks.state
    restored = applied.undo()
    undone = weights(module)
    monitor.close()
    return before, after, undone, restored, state, applied.record["note"]


def test_a_clip_scales_the_head_of_its_own_stage_and_nothing_else(ranks):
    given, _ = ranks(clip_on_last_stage)
    for rank, (before, after, undone, restored, state, _) in enumerate(given):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        wanted = {f"0.attn.{part}.{kind}" for part in "qk" for kind in ("weight", "bias")}
        assert changed == (wanted if rank == 1 else set())
        assert restored
        assert state == "together"
        assert all(torch.equal(before[name], undone[name]) for name in before)
        for name in changed:
            rows = (before[name] != after[name]).reshape(4, 8, -1).any(-1).any(-1)
            assert rows.tolist() == [False, False, False, True]
    assert "other stages: stage1.0.attn" in given[0][-1]


def heads_on_two_ranks(rank, folder):
    """The fault is on head 1 of the two of rank 1."""
    model = whole(2).train()
    split_heads(model)
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, folder, "guard", sinks=["jsonl"])

    def grow(at):
        if at >= FAULT_AT and rank == 1:
            factor = 2.0 if at < FAULT_STEPS else math.nan
            grow_head(model[1].attn.q.weight.to_local(), 1, factor, of=2)

    step = plain_step(model)
    given = train(step, model, optimizer, monitor, FAULT_STEPS, grow)
    errors, applied = dict(monitor.errors), [each.intervention.name for each in monitor.applied]
    monitor.close()
    return given[STEPS - 1].readings[STEPS - 1], errors, applied, monitor._ranks.collectives


def test_heads_of_tensor_parallel_ranks_have_their_numbers_of_the_whole_model(ranks):
    given, folder = ranks(heads_on_two_ranks)
    expected = single()
    for reading, errors, applied, _ in given:
        assert errors == {}
        assert applied == given[0][2]
        same_as(reading, expected, LAYERS)
    stored = lines(folder / "stabmon" / "issues.jsonl")
    # the last is none of the alarms, since guard leaves the step out
    kinds = {"entropy_collapse", "logit_growth", "non_finite"}
    assert {each["issue_type"] for each in stored} >= kinds
    assert {(each["layer"], each["head"]) for each in stored} == {("1.attn", HEAD)}


SCENARIOS = [
    pipeline_of_equal_names,
    pipeline_of_kept_names,
    pipeline_that_adds_its_micro_batches,
    fault_on_last_stage,
    part_of_last_stage,
    groups_of_last_stage,
    harmless_jump_on_last_stage,
    clip_on_last_stage,
    heads_on_two_ranks,
]
