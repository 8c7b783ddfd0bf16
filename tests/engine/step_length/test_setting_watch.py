"""A group's rate that jumps is told at the step that uses it, and under guard never used."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stabmon

RATE, AT, STEPS = 3e-3, 20, 44


class Loop:
    """A loop that sets every group's rate at each step, as many do."""

    def __init__(self, schedule, config="observe", *, optimizer=torch.optim.AdamW, **more):
        torch.manual_seed(0)
        self.model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        own = [self.model.self_attn.in_proj_weight]
        rest = [each for each in self.model.parameters() if each is not own[0]]
        groups = [{"params": rest, "name": "rest"}, {"params": own, "name": "qkv"}]
        self.optimizer = optimizer(groups, lr=RATE, **more)
        self.schedule, self.config, self.moved, self.told = schedule, config, [], []
        self.rates: list[list[float]] = []

    def run(self, steps=STEPS, monitored=True):
        x, y = torch.randn(16, 5, 16), torch.randn(16, 5, 16)
        self.monitor = None
        if monitored:
            self.monitor = stabmon.AttentionStabilityMonitor(
                self.model, self.optimizer, config=self.config, log_every=10, sinks=[]
            )
        weight = self.model.self_attn.in_proj_weight
        for step in range(1, steps + 1):
            self.schedule(self.optimizer, step)
            loss = (self.model(x) - y).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            before = weight.detach().clone()
            self.optimizer.step()
            self.moved.append(float((weight.detach() - before).norm() / before.norm()))
            self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
            diagnosis = self.monitor.on_step(loss.detach()) if self.monitor else None
            self.told += diagnosis.issues if diagnosis else []
        if self.monitor:
            self.monitor.close()
            assert not self.monitor.errors
        return self

    @property
    def jumps(self):
        return [each for each in self.told if each.issue_type == "update_spike"]


def jump(times, group=1):
    def schedule(optimizer, step):
        for each in optimizer.param_groups:
            each["lr"] = RATE
        if step > AT:
            optimizer.param_groups[group]["lr"] *= times

    return schedule


def test_a_jump_is_told_at_its_step_with_the_group_in_words_and_changes_nothing():
    loop, alone = Loop(jump(50)).run(), Loop(jump(50)).run(monitored=False)
    first = loop.jumps[0]
    assert (first.step, first.layer, first.is_alarm) == (AT + 1, None, True)
    assert first.evidence["highest_rates_before"] == {"0.1": pytest.approx(RATE)}
    assert 0.99 * loop.moved[AT] <= first.evidence["updates"]["0.1"] < 3 * loop.moved[AT]
    assert "0.1 'qkv' (self_attn)" in first.suggestion
    for ours, theirs in zip(loop.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"foreach": False}), (torch.optim.SGD, {})],
)
def test_guard_makes_no_step_at_the_rate_that_jumped(optimizer, more):
    times = 50 if optimizer is torch.optim.AdamW else 5000
    loop = Loop(jump(times), "guard", optimizer=optimizer, **more).run()
    assert [each.state for each in loop.jumps] == ["opened", "closed"]
    assert loop.jumps[0].step == AT + 1
    assert max(loop.moved[AT:]) < 2 * max(loop.moved[:AT])
    assert loop.rates[-1] == [RATE, pytest.approx(times * RATE)], "the loop sees its own rates"
    caps = [each.record for each in loop.monitor.applied if "cap" in each.intervention.name]
    assert [each["after"]["caps"] for each in caps] == [{"0.1": pytest.approx(RATE)}]
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert not loop.optimizer._optimizer_step_post_hooks


def test_of_several_groups_that_jump_each_is_held_at_its_own_past():
    def schedule(optimizer, step):
        for each, times in zip(optimizer.param_groups, (1.0, 3.0), strict=True):
            each["lr"] = RATE * times * (100.0 if step > AT else 1.0)

    loop = Loop(schedule, "guard").run()
    expected = {"0.0": pytest.approx(RATE), "0.1": pytest.approx(3 * RATE)}
    assert loop.jumps[0].evidence["highest_rates_before"] == expected
    assert max(loop.moved[AT:]) < 2 * max(loop.moved[:AT])


def warm_up(step):
    return min(1.0, step / 15)


def restarts(step):
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step % 11) / 11))


def one_cycle(step):
    return 0.04 + 0.96 * math.sin(math.pi * step / STEPS)


def by_the_epoch(step):
    return 1e-4 if step <= AT else 1.0


SCHEDULES = {
    "warm-up": lambda step: (warm_up(step), warm_up(step)),
    "restarts": lambda step: (restarts(step), restarts(step)),
    "one cycle": lambda step: (one_cycle(step), one_cycle(step)),
    "unfrozen": lambda step: (1.0, float(step > AT)),
    "discriminative": lambda step: (warm_up(step) / 20, warm_up(step)),
    "by the epoch": lambda step: (by_the_epoch(step), by_the_epoch(step)),
    "unfrozen, then by the epoch": lambda step: (1.0, 0.0 if step <= 5 else by_the_epoch(step)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_healthy_runs_are_no_jump_and_are_used_as_they_are(name):
    def schedule(optimizer, step):
        for each, share in zip(optimizer.param_groups, SCHEDULES[name](step), strict=True):
            each["lr"] = RATE * share

    loop, alone = Loop(schedule, "guard").run(), Loop(schedule).run(monitored=False)
    assert not loop.jumps
    # by the epoch, the first step at a new rate is held back, to see that it is none too high
    assert sum(ours != theirs for ours, theirs in zip(loop.moved, alone.moved, strict=True)) <= (
        STEPS - AT if "epoch" in name else 0
    )
    assert loop.moved[-1] == pytest.approx(alone.moved[-1], rel=0.1)


def test_a_group_that_is_added_later_has_no_past():
    def schedule(optimizer, step):
        if step == AT:
            optimizer.add_param_group({"params": [extra], "lr": 100 * RATE})

    loop = Loop(schedule, "guard")
    extra = loop.model.extra = nn.Parameter(torch.randn(4, 4))
    assert not loop.run().jumps


def test_a_rate_in_a_tensor_is_held_back_too():
    def schedule(optimizer, step):
        for each in optimizer.param_groups:
            each["lr"] = torch.tensor(RATE)
        if step > AT:
            optimizer.param_groups[1]["lr"] = torch.tensor(50 * RATE)

    loop = Loop(schedule, "guard").run()
    assert loop.jumps[0].step == AT + 1
    assert max(loop.moved[AT:]) < 2 * max(loop.moved[:AT])


def test_a_resumed_run_knows_the_past_of_its_rates():
    first = Loop(lambda optimizer, step: None).run(AT)
    second = Loop(jump(1))
    monitor = stabmon.AttentionStabilityMonitor(
        second.model, second.optimizer, log_every=10, sinks=[]
    )
    monitor.load_state_dict(first.monitor.state_dict())
    second.optimizer.param_groups[1]["lr"] = 50 * RATE
    second.model(torch.randn(4, 5, 16)).square().mean().backward()
    second.optimizer.step()
    diagnosis = monitor.on_step(1.0)
    monitor.close()
    assert [each.issue_type for each in diagnosis.issues] == ["update_spike"]


def decay(optimizer, step):
    if step == AT + 1:
        optimizer.param_groups[1]["weight_decay"] = 30.0


def test_a_jump_of_the_decay_is_told_at_its_step_with_the_group_in_words():
    (first,) = Loop(decay, weight_decay=0.1).run().jumps
    assert (first.step, first.layer, first.is_alarm) == (AT + 1, None, True)
    assert first.evidence["decays_before"] == {"0.1": 0.1}
    assert first.evidence["shares_taken"] == {"0.1": pytest.approx(30 * RATE)}
    assert "0.1 'qkv' (self_attn)" in first.suggestion


def test_guard_makes_no_step_with_the_decay_that_jumped():
    loop, alone = Loop(decay, "guard", weight_decay=0.1).run(), Loop(decay, weight_decay=0.1)
    alone.schedule = lambda optimizer, step: None
    assert loop.moved == alone.run(monitored=False).moved
    assert [each.state for each in loop.jumps] == ["opened", "closed"]
    assert loop.optimizer.param_groups[1]["weight_decay"] == 30.0
    assert not loop.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        (torch.optim.AdamW, 0.01, 1.0),  # a hundred times as much, and still no share that matters
        (torch.optim.AdamW, 30.0, 30.0),  # so from the first step on: no past to compare with
        (torch.optim.Adam, 0.1, 30.0),  # Adam normalises it
    ],
)
def test_other_decays_are_no_jump(optimizer, before, after):
    def schedule(given, step):
        given.param_groups[1]["weight_decay"] = after if step > AT else before

    assert not Loop(schedule, "guard", optimizer=optimizer, weight_decay=before).run().jumps
