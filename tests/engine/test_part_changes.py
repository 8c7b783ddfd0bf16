"""Weights of each part, from one sampled step to the next."""

import math

import pytest
import torch
from torch import nn

import stabmon
from stabmon.engine.updates.part_changes import parts_of
from stabmon.interventions.base import INTERVENTIONS
from tests.support.intervention_runs import growth


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        return self.mlp(x + self.attn(x, x, x, need_weights=False)[0])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(edit, steps=30, config="observe"):
    """Train; ``edit(model, step, monitor)`` may change it before a step."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found, readings = [], []
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, config=config, log_every=5, sinks=[]
    ) as monitor:
        for step in range(1, steps + 1):
            edit(model, step, monitor)
            ids = torch.randint(0, 16, (4, 6))
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            diagnosis = monitor.on_step(loss.detach())
            if diagnosis:
                found += diagnosis.issues
                readings.append(monitor._tracker.history.latest)
        assert not monitor.errors
    return [each for each in found if each.issue_type == "weight_jump"], readings


def test_parts_are_attention_the_modules_beside_it_and_those_outside_of_blocks():
    model = Model()
    names = parts_of(model, ["blocks.0.attn", "blocks.1.attn"])
    own = {name: names[id(each)] for name, each in model.named_parameters()}
    assert own["blocks.1.attn.out_proj.weight"] == "blocks.1.attn"
    assert own["blocks.1.mlp.2.bias"] == "blocks.1.mlp"
    assert (own["embed.weight"], own["head.bias"]) == ("embed", "head")


@torch.no_grad()
def multiply(model, step, monitor):
    if step == 22:
        model.embed.weight.data.mul_(100.0)


def test_an_embedding_that_is_multiplied_is_told_at_the_next_reading():
    found, readings = train(multiply)
    assert (found[0].step, found[0].layer, found[0].state) == (25, "embed", "opened")
    assert found[0].value == pytest.approx(100, rel=0.1)
    change = readings[2].parts["head"]
    assert change.weight == pytest.approx(change.before, rel=0.05)
    assert 0 < change.update < 0.1


def test_training_and_edits_of_stabmon_itself_give_nothing():
    def clip(model, step, monitor):
        if step == 22:
            clip = INTERVENTIONS["qk_clip"](target=1e-3).aimed_at([growth("blocks.0.attn")], "")
            applied = monitor.apply(clip, hold=False)
            assert applied is not None

    assert not train(lambda model, step, monitor: None)[0]
    found, readings = train(clip)
    assert math.isnan(readings[4].parts["blocks.0.attn"].before), "stabmon edits it"
    assert readings[4].parts["blocks.1.attn"].before > 0
    assert not found
