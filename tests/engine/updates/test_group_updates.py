"""The share by which each group moves, against the parameters themselves, under optimizers that
step in their own ways.
"""

import math

import pytest
import torch
from torch import nn
from transformers import Adafactor

import stabmon
from stabmon._torch.optimizer_adapter import parameter_groups
from stabmon.engine.updates.group_updates import GroupUpdates
from stabmon.sinks.reader import read_records
from tests.support.small_runs import batches, gpt2, optimizer_of, same_bits, weights


class Lion(torch.optim.Optimizer):
    """Steps by the sign of an average, and writes through ``.data`` as many published optimizers
    do.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    average.mul_(0.9).add_(p.grad, alpha=0.1)
                    p.data.add_(average.sign(), alpha=-group["lr"])


MAKES = {
    "muon": lambda inner, outer: [torch.optim.Muon(inner, lr=0.05), torch.optim.AdamW(outer, 3e-3)],
    "lion": lambda inner, outer: [Lion(inner, lr=1e-3), torch.optim.SGD(outer, 0.1)],
    "adafactor": lambda inner, outer: [
        Adafactor(inner, relative_step=True),
        torch.optim.Adafactor(outer, lr=1e-2),
    ],
}


def split(model):
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    return inner, [p for p in model.parameters() if all(p is not each for each in inner)]


@pytest.mark.parametrize("name", MAKES)
def test_the_share_is_what_the_step_changed_over_what_was_there(name, tmp_path):
    model = gpt2()
    inner, outer = split(model)
    optimizers = MAKES[name](inner, outer)
    with stabmon.AttentionStabilityMonitor(
        model, optimizers, log_every=1, sinks=["jsonl"], run_dir=tmp_path
    ) as monitor:
        shares = []
        for ids in batches(3):
            model(input_ids=ids, labels=ids).loss.backward()
            before = [[p.detach().clone() for p in group if p.ndim > 1] for group in (inner, outer)]
            for each in optimizers:
                each.step()
                each.zero_grad()
            now = [[p.detach() for p in group if p.ndim > 1] for group in (inner, outer)]
            shares.append(
                [norm(map(torch.sub, a, b)) / norm(b) for a, b in zip(now, before, strict=True)]
            )
            monitor.on_step()
    assert not monitor.errors
    found = read_records(tmp_path).readings
    for reading, expected in zip(found, shares, strict=True):
        assert list(reading.updates) == ["0.0", "1.0"]
        assert list(reading.updates.values()) == pytest.approx(expected, rel=1e-5)
        assert min(reading.updates.values()) > 0
        assert reading.query_key["transformer.h.0.attn"].relative_update > 0
    rates = {
        "muon": {"0.0": 0.05, "1.0": 3e-3},
        "lion": {"0.0": 1e-3, "1.0": 0.1},
        "adafactor": {"1.0": 1e-2},
    }[name]
    assert found[-1].learning_rates == rates
    assert found[-1].learning_rate == max(rates.values())
    history = monitor._tracker.history
    assert history.group_updates["1.0"] == pytest.approx([row[1] for row in shares], rel=1e-5)
    assert list(history.used_rates) == list(rates)


def norm(tensors):
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors))


def test_a_large_group_is_sampled_and_one_far_step_is_told_to_within_a_tenth():
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(256, 512) * 0.02 * (1 + at % 3)) for at in range(40)]
    group = torch.optim.SGD(tensors, lr=1.0)
    updates = GroupUpdates()
    updates.before(parameter_groups([group]))
    assert sum(was.numel() for pairs in updates._before.values() for _, was in pairs) <= 1 << 20
    moved = [torch.randn_like(each) * 1e-3 for each in tensors]
    with torch.no_grad():
        for each, by in zip(tensors, moved, strict=True):
            each += by
    expected = norm(moved) / norm(
        each.detach() - by for each, by in zip(tensors, moved, strict=True)
    )
    assert updates.after() == {"0.0": pytest.approx(expected, rel=0.1)}
    assert updates.after() == {}


def test_watching_two_optimizers_leaves_training_as_it_was():
    def trained(watched):
        model = gpt2(dropout=0.1)
        optimizers = MAKES["muon"](*split(model))
        monitor = (
            stabmon.AttentionStabilityMonitor(model, optimizers, log_every=1, sinks=[])
            if watched
            else None
        )
        torch.manual_seed(5)
        for ids in batches(4):
            model(input_ids=ids, labels=ids).loss.backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
            if monitor is not None:
                monitor.on_step()
        if monitor is not None:
            monitor.close()
            assert not monitor.errors
        assert not any(
            each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in optimizers
        )
        return weights(model), torch.get_rng_state()

    (one, state), (other, other_state) = trained(True), trained(False)
    assert same_bits(one, other)
    assert torch.equal(state, other_state)


def test_a_state_of_before_groups_were_known_keeps_loading():
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[])
    for ids in batches(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        monitor.on_step()
    state = monitor.state_dict()
    kept = [dict(reading) for reading in state["tracker"]["history"]["readings"]]
    for reading in state["tracker"]["history"]["readings"]:
        for name in ("learning_rates", "rate_factors", "updates"):
            del reading[name]
    monitor.load_state_dict(state)
    assert [reading.updates for reading in monitor._tracker.history.readings] == [{}, {}]
    state["tracker"]["history"]["readings"] = kept
    monitor.load_state_dict(state)
    assert monitor._tracker.history.latest.updates == kept[-1]["updates"]
    assert (
        monitor._tracker.history.used_rates["0.0"].tolist() == [optimizer.param_groups[0]["lr"]] * 2
    )
    monitor.close()
