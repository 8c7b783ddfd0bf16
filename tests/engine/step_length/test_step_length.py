"""A rate that is too high is told from the first step on, whatever the interval, and changes
nothing in observe.
"""

import copy
import logging

import pytest
import torch
from torch import nn

import stabmon
from tests.support.sweeps import sweep

STEPS, GOOD = 40, 3e-3


class Model(nn.Module):
    """One block of attention with dropout; ``forward(ids, labels)`` gives (logits, loss), or logits
    alone.
    """

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.embed, self.head = nn.Embedding(32, 32), nn.Linear(32, 32)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.drop = nn.Dropout(0.1)

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        q, k, v = (
            f(x).unflatten(-1, (4, 8)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.drop(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        logits = self.head(x)
        return (
            logits
            if labels is None
            else (logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        )


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, 32, (8, 12), generator=generator)
        yield ids, (3 * ids + 1) % 32


def trained():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), GOOD)
    for ids, labels in batches(60, seed=9):
        optimizer.zero_grad()
        model(ids, labels)[1].backward()
        optimizer.step()
    return model.state_dict()


WEIGHTS = trained()


def run(rate, config=None, *, inside=True, fresh=False, log_every=50, groups=False, micro=1):
    torch.manual_seed(1)
    model = Model()
    if not fresh:
        model.load_state_dict(WEIGHTS)
    named = dict(model.named_parameters())
    query_key = [p for name, p in named.items() if name.startswith(("q_proj", "k_proj"))]
    rest = [p for p in named.values() if all(p is not each for each in query_key)]
    split = [{"params": query_key, "lr": rate}, {"params": rest, "lr": GOOD / 3}]
    optimizer = torch.optim.AdamW(split if groups else model.parameters(), rate)
    monitor = config and stabmon.AttentionStabilityMonitor(
        model, optimizer, config=config, log_every=log_every, sinks=[]
    )
    losses = []
    for ids, labels in batches(STEPS):
        optimizer.zero_grad()
        for part, target in zip(ids.chunk(micro), labels.chunk(micro), strict=True):
            loss = (
                model(part, target)[1]
                if inside
                else nn.functional.cross_entropy(model(part).flatten(0, 1), target.flatten())
            )
            (loss / micro).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if monitor:
            monitor.on_step(loss=loss.detach())
    if monitor:
        assert not monitor.errors
        monitor.close()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    return losses, copy.deepcopy(model.state_dict()), monitor


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("micro", sweep([2, 1], keep=1))
def test_at_a_hundred_times_the_rate_trained_weights_are_told_of_at_the_first_step_and_spared_by_guard(
    inside, micro, caplog
):
    caplog.set_level(logging.CRITICAL)
    left, _, observed = run(100 * GOOD, "observe", inside=inside, micro=micro)
    first = observed.issues[0]
    assert (first.step, first.issue_type, first.severity, first.layer) == (
        1,
        "update_spike",
        "error",
        None,
    )
    assert GOOD / 30 < first.evidence["fitting_rate"] < 10 * GOOD
    assert first.suggestion.startswith("Lower the rate")
    guarded, _, guard = run(100 * GOOD, "guard", inside=inside, micro=micro)
    right = run(GOOD, inside=inside, micro=micro)[0]
    assert sum(guarded) / STEPS < sum(right) / STEPS + 0.1 < sum(left) / STEPS
    acts = [each for each in guard.applied if each.intervention.name == "cap_learning_rate"]
    assert acts[0].record["after"]["shortened"]


@pytest.mark.parametrize(("rate", "fresh"), [(GOOD, False), (GOOD / 10, False), (GOOD, True)])
def test_rates_that_fit_are_no_alarm_and_observing_changes_no_bit(rate, fresh):
    plain = run(rate, fresh=fresh)
    seen = run(rate, "observe", fresh=fresh)
    assert [issue for issue in seen[2].issues if issue.issue_type == "update_spike"] == []
    assert plain[0] == seen[0]
    assert all(torch.equal(plain[1][name], value) for name, value in seen[1].items())


def test_observing_a_rate_that_is_too_high_changes_no_bit_either():
    plain, seen = run(100 * GOOD), run(100 * GOOD, "observe")
    assert seen[2].issues
    assert plain[0] == seen[0]
    assert all(torch.equal(plain[1][name], value) for name, value in seen[1].items())


def test_of_two_groups_the_one_that_is_too_fast_is_held_alone():
    _, _, guard = run(100 * GOOD, "guard", groups=True)
    caps = [
        each.record["after"]["caps"]
        for each in guard.applied
        if each.intervention.name == "cap_learning_rate"
    ]
    assert caps
    assert set(caps[0]) == {"0.0"}


def test_of_a_compiled_model_with_an_output_that_nothing_uses_no_hook_raises_into_backward():
    class Two(Model):
        def forward(self, ids, labels=None):
            logits, loss = super().forward(ids, labels)
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    model = Two()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), GOOD)
    with stabmon.AttentionStabilityMonitor(compiled, optimizer, log_every=2, sinks=[]) as monitor:
        for ids, labels in batches(4):
            optimizer.zero_grad()
            loss = compiled(ids, labels)["loss"]
            loss.backward()
            optimizer.step()
            monitor.on_step(loss=loss.detach())
        assert not monitor.errors
