"""Norms of W_q and W_k around an optimizer step, against the weights themselves."""

import copy
import math

import peft
import pytest
import torch
from torch import nn

import stabmon
from stabmon.interventions.qk_clip import QkClip
from stabmon.records import StabilityIssue
from stabmon.sinks.reader import read_records
from tests.support.small_runs import (
    Floats,
    batches,
    gpt2,
    llama,
    optimizer_of,
    same_bits,
    train,
    weights,
)


def query_key(name, model):
    """Everything that makes the queries and keys of the first layer, as one vector a parameter."""
    if name == "gpt2":
        attention = model.transformer.h[0].attn.c_attn
        return [(attention.weight, (slice(None), slice(0, 64))), (attention.bias, (slice(0, 64),))]
    attention = model.model.layers[0].self_attn
    return [(attention.q_proj.weight, ()), (attention.k_proj.weight, ())]


def norm(tensors):
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_norms_are_those_of_the_queries_and_keys_alone(name, tmp_path):
    model = {"gpt2": gpt2, "llama": llama}[name]()
    optimizer, parts = optimizer_of(model), query_key(name, model)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, log_every=2, schedule="fixed", sinks=["jsonl"], run_dir=tmp_path
    )
    train(model, monitor, optimizer, batches(1))
    before = [p.detach()[at].clone() for p, at in parts]
    model(input_ids=batches(2)[1], labels=batches(2)[1]).loss.backward()
    gradient = norm(p.grad[at] for p, at in parts)
    optimizer.step()
    monitor.on_step()
    monitor.close()
    assert not monitor.errors
    (reading,) = read_records(tmp_path).readings
    layer = next(iter(reading.layers))
    moved = reading.query_key[layer]
    assert moved.gradient == pytest.approx(gradient, rel=1e-5)
    assert moved.weight == pytest.approx(norm(before), rel=1e-5)
    assert moved.update == pytest.approx(
        norm(p.detach()[at] - was for (p, at), was in zip(parts, before, strict=True)), rel=1e-5
    )
    assert moved.update > 0
    assert len(reading.query_key) == 2


def test_layers_whose_queries_cannot_be_told_apart_are_left_out():
    class Odd(Floats):
        def __init__(self):
            super().__init__()
            for layer in (self.first, self.second):
                layer.strange, layer.other = layer.q, layer.k
                del layer.q, layer.k
                layer.forward = lambda x, layer=layer: odd(layer, x)

    def odd(layer, x):
        query, key, value = (
            part(x).unflatten(-1, (4, -1)).transpose(1, 2)
            for part in (layer.strange, layer.other, layer.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return layer.o(mixed.transpose(1, 2).flatten(-2))

    model = Odd()
    optimizer = optimizer_of(model)
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        model(torch.randn(2, 20, 32)).sum().backward()
        optimizer.step()
        assert monitor.on_step().stats
        assert monitor._tracker.history.latest.query_key == {}
        assert not monitor.errors


@pytest.mark.parametrize("kind", ["lora", "dora", "prompts"])
def test_under_adapters_it_is_what_they_effectively_make_of_the_weights_and_training_is_as_it_was(
    kind,
):
    def trained(watched):
        if kind == "prompts":
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        else:
            config = peft.LoraConfig(
                r=4, use_dora=kind == "dora", lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
            )
        model = peft.get_peft_model(llama(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        monitor = (
            stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[])
            if watched
            else None
        )
        torch.manual_seed(5)
        formed = []
        for ids in batches(3):
            model(input_ids=ids, labels=ids).loss.backward()
            before = effective(model)
            optimizer.step()
            formed.append(
                (
                    norm(before),
                    norm(now - was for now, was in zip(effective(model), before, strict=True)),
                )
            )
            optimizer.zero_grad()
            if monitor is not None:
                monitor.on_step()
        if monitor is not None:
            assert not monitor.errors
        return weights(model), formed, monitor

    def effective(model):
        attention = (
            model.base_model.model.model.layers[0].self_attn
            if kind != "prompts"
            else model.base_model.model.layers[0].self_attn
        )
        merged = copy.deepcopy(attention.q_proj)
        if kind != "prompts":
            merged.merge()
            merged = merged.get_base_layer()
        return [merged.weight.detach(), attention.k_proj.weight.detach().clone()]

    (one, formed, monitor), (other, _, _) = trained(True), trained(False)
    assert same_bits(one, other)
    readings = monitor._tracker.history.readings
    assert all(info.adapted for reading in readings for info in reading.info.values())
    for reading, (weight, update) in zip(readings, formed, strict=True):
        assert len(reading.query_key) == (0 if kind == "prompts" else 2)
        assert reading.updates["0.0"] > 0
        if kind != "prompts":
            step = next(iter(reading.query_key.values()))
            assert (step.weight, step.update) == (
                pytest.approx(weight, rel=1e-5),
                pytest.approx(update, rel=1e-3),
            )
            assert step.gradient > 0
    monitor.close()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_clip_that_is_held_is_no_part_of_the_optimizers_step(name):
    model = {"gpt2": gpt2, "llama": llama}[name]()
    optimizer, parts = optimizer_of(model), query_key(name, model)
    before, unclipped = [], []

    def copy_to(kept):
        return lambda *_: kept.append([p.detach()[at].clone() for p, at in parts])

    optimizer.register_step_pre_hook(copy_to(before))
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        train(model, monitor, optimizer, batches(2))
        layer = next(iter(monitor._tracker.history.layers))
        issue = StabilityIssue(2, layer, None, "logit_growth", "error", 1.0, 0.5, "")
        assert monitor.apply(QkClip(target=1e-3, issues=(issue,)), hold=True)
        monitor._guard.run.before_edit.append(copy_to(unclipped))
        for _ in range(2):  # each step leaves scores above the target
            before.clear(), unclipped.clear()
            train(model, monitor, optimizer, batches(1))
            step = norm(now - was for now, was in zip(unclipped[0], before[0], strict=True))
            whole = norm(
                p.detach()[at] - was for (p, at), was in zip(parts, before[0], strict=True)
            )
            reading = monitor._tracker.history.latest
            assert reading.query_key[layer].update == pytest.approx(step, rel=1e-5)
            assert whole != pytest.approx(step, rel=1e-3), "the clip moves them too"
        assert not monitor.errors
