"""What every intervention has in common: applied and undone, the run is bit for bit what it was;
refused, it never was touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

import stabmon
from stabmon.interventions import INTERVENTIONS, Intervention, NotApplicable, TrainingRun
from stabmon.interventions.cap_learning_rate import CapLearningRate
from stabmon.interventions.cap_query_key_norm import CapQueryKeyNorm
from stabmon.interventions.cap_query_key_update import CapQueryKeyUpdate
from stabmon.interventions.cap_scale import CapScale
from stabmon.interventions.entropy_regularization import EntropyRegularization
from stabmon.interventions.extend_warmup import ExtendWarmup
from stabmon.interventions.increase_dropout import IncreaseDropout
from stabmon.interventions.logit_softcap import LogitSoftcap
from stabmon.interventions.lower_learning_rate import LowerLearningRate
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.rollback import Rollback
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.interventions.skip_step import SkipStep
from stabmon.interventions.soften_logits import SoftenLogits
from stabmon.interventions.stop import Stop
from stabmon.records import StabilityIssue
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    run_of,
    train_step,
)

ACTS: dict[str, tuple[str, Callable[[], Intervention]]] = {
    "lower_learning_rate": ("gpt2-sdpa", lambda: LowerLearningRate(factor=0.5)),
    "lower_learning_rate of queries and keys": (
        "llama-sdpa",
        lambda: LowerLearningRate(factor=0.1, where="query_key"),
    ),
    "cap_learning_rate": ("gpt2-sdpa", lambda: CapLearningRate(cap=1e-3)),
    "cap_query_key_update": ("gpt2-sdpa", lambda: CapQueryKeyUpdate(share=1e-4)),
    "cap_query_key_update norm": ("gemma3-sdpa", lambda: CapQueryKeyUpdate(share=1e-4)),
    "cap_query_key_norm": ("gpt2-sdpa", lambda: CapQueryKeyNorm(times=0.5)),
    "cap_query_key_norm grouped": ("llama-sdpa", lambda: CapQueryKeyNorm(times=0.5)),
    "cap_query_key_norm norm": ("gemma3-sdpa", lambda: CapQueryKeyNorm(times=0.5)),
    "cap_scale": ("llama-sdpa", lambda: CapScale(cap=0.01)),
    "extend_warmup": ("gpt2-sdpa", ExtendWarmup),
    "increase_dropout float": ("llama-sdpa", IncreaseDropout),
    "increase_dropout module": ("bert-sdpa", IncreaseDropout),
    "increase_dropout multihead": ("transformer_encoder", IncreaseDropout),
    "qk_clip fused": ("gpt2-sdpa", lambda: QkClip(target=0.01)),
    "qk_clip grouped": ("llama-sdpa", lambda: QkClip(target=0.01)),
    "qk_clip norm": ("gemma3-sdpa", lambda: QkClip(target=0.01)),
    "soften_logits": ("llama-sdpa", SoftenLogits),
    "logit_softcap": ("gemma2-eager", lambda: LogitSoftcap(cap=1.0)),
    "entropy_regularization": ("gpt2-sdpa", EntropyRegularization),
    "skip_step": ("gpt2-sdpa", SkipStep),
    "rollback": ("gpt2-sdpa", Rollback),
    "stop": ("gpt2-sdpa", Stop),
}


def ready(name: str) -> TrainingRun:
    """A run some steps old, with a healthy state behind it."""
    run = run_of(name, steps=2)
    run.prepared = [HealthyStates(run, every=1, confirm=0)]
    run.prepared[0].offer(True)
    run.prepared[0].offer(True)
    train_step(run)
    run.optimizer.zero_grad()
    return run


@pytest.mark.parametrize("name", ACTS)
def test_applied_and_undone_every_bit_is_as_it_was(name: str) -> None:
    model, make = ACTS[name]
    run = ready(model)
    before = all_bits(run)
    applied = make().apply(run, growth(first_layer(run)))
    assert applied.undo() is True
    assert differences(before, all_bits(run)) == []
    assert applied.undo() is True, "a second call does nothing"
    assert [record["action"] for record in run.records] == ["applied", "undone"]
    assert not any(
        run.step_hooks.wants(mark) for mark in ("attention", "before_optimizer_step", "on_step")
    )


@pytest.mark.parametrize("name", ACTS)
def test_training_after_an_undo_is_bit_for_bit_training_without_the_act(name: str) -> None:
    model, make = ACTS[name]
    plain, run = ready(model), ready(model)
    make().apply(run, growth(first_layer(run))).undo()
    for each in (plain, run):
        torch.manual_seed(3)
        train_step(each)
        each.optimizer.zero_grad()
    assert differences(all_bits(plain), all_bits(run)) == []


def test_an_undo_that_fails_repeats_the_change_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready("gpt2-sdpa")
    applied = CapLearningRate(cap=1e-5).apply(run)
    assert run.rates.factor < 1
    monkeypatch.setattr(applied.effect, "undo", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        applied.undo()
    assert (run.rates.factor, applied.active) == (1, False)


def test_a_release_that_fails_is_not_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready("gpt2-sdpa")
    applied = CapLearningRate(cap=1e-5).apply(run)
    with monkeypatch.context() as failing:
        failing.setattr(applied.effect, "release", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            applied.release()
    assert applied.active
    applied.release()
    assert (run.rates.factor, applied.active) == (1, False)


@pytest.mark.parametrize("name", ACTS)
def test_the_record_and_the_state_are_plain_values_that_say_what_where_before_after_why_and_when(
    name: str,
) -> None:
    model, make = ACTS[name]
    run = ready(model)
    applied = make().apply(run, growth(first_layer(run)))
    record = run.records[0]
    assert record == {**applied.record, "action": "applied"}
    assert record["intervention"] == name.split()[0]
    assert record["step"] == run.step == 3
    assert record["why"]
    assert record["places"]
    assert json.loads(json.dumps(applied.state_dict())) == json.loads(
        json.dumps(applied.state_dict())
    )
    if name not in ("skip_step", "entropy_regularization"):
        assert record["before"] != record["after"]
    json.dumps(record)


@pytest.mark.parametrize(
    "name", [each for each in ACTS if each not in ("rollback", "stop", "cap_scale")]
)
def test_a_held_act_is_held_again_after_a_resume_and_let_go_of_without_a_trace(name: str) -> None:
    model, make = ACTS[name]
    run, fresh = ready(model), ready(model)
    untouched = all_bits(fresh)
    applied = make().apply(run, growth(first_layer(run)))
    state = json.loads(json.dumps(applied.state_dict()))
    held = INTERVENTIONS[state["intervention"]](**state["settings"]).resume(fresh, state)
    assert held.record == json.loads(json.dumps(applied.record))
    assert held.active
    held.release()
    assert differences(untouched, all_bits(fresh)) == []
    assert not any(
        fresh.step_hooks.wants(mark) for mark in ("attention", "before_optimizer_step", "on_step")
    )


def test_every_registered_intervention_is_tested_here() -> None:
    assert {name.split()[0] for name in ACTS} == set(INTERVENTIONS)


def test_acts_on_the_same_thing_are_undone_last_in_first_out() -> None:
    run = ready("llama-sdpa")
    layer = first_layer(run)
    before = all_bits(run)
    first = IncreaseDropout(by=0.1).apply(run, growth(layer))
    second = IncreaseDropout(by=0.2).apply(run, growth(layer))
    other = IncreaseDropout(by=0.1).apply(run, growth(list(run.layers)[1]))
    assert run.layers[layer].attention_dropout == pytest.approx(0.3)
    first.undo()
    assert not second.active
    assert other.active
    other.undo()
    assert differences(before, all_bits(run)) == []


def test_an_attribute_that_somebody_set_since_is_left_to_them() -> None:
    run = ready("llama-sdpa")
    layer = first_layer(run)
    applied = IncreaseDropout().apply(run, growth(layer))
    run.layers[layer].attention_dropout = 0.42
    assert applied.undo() is False
    assert run.layers[layer].attention_dropout == 0.42


def test_dropout_that_the_fused_path_does_not_read_is_refused() -> None:
    run = ready("falcon-sdpa")
    before = all_bits(run)
    with pytest.raises(NotApplicable, match="does not read"):
        IncreaseDropout().apply(run, growth(first_layer(run)))
    assert differences(before, all_bits(run)) == []


def test_dropout_is_never_raised_above_its_most() -> None:
    run = ready("llama-sdpa")
    run.layers[first_layer(run)].attention_dropout = 0.45
    IncreaseDropout(by=0.1, most=0.5).apply(run, growth(first_layer(run)))
    assert run.layers[first_layer(run)].attention_dropout == 0.5
    with pytest.raises(NotApplicable, match="or above already"):
        IncreaseDropout(by=0.1, most=0.5).apply(run, growth(first_layer(run)))


@pytest.mark.parametrize(
    "name",
    [
        "gpt2-sdpa",
        "llama-sdpa",
        "bert-sdpa",
        "qwen3-sdpa",
        "gemma2-eager",
        "gpt_neox-sdpa",
        "vit-sdpa",
    ],
)
def test_a_temperature_divides_every_head_of_the_layer(name: str) -> None:
    from tests.support.intervention_runs import scores_of

    run = ready(name)
    layer = first_layer(run)
    before = scores_of(run)[layer]
    SoftenLogits(temperature=4).apply(run, growth(layer))
    torch.testing.assert_close(
        torch.tensor(scores_of(run)[layer] * 4), torch.tensor(before), rtol=1e-5, atol=0
    )


def test_a_scale_that_the_attention_does_not_read_and_one_that_is_not_there_are_refused() -> None:
    run = ready("hand_written-fused")
    layer = first_layer(run)
    with pytest.raises(NotApplicable, match="holds no scale"):
        SoftenLogits().apply(run, growth(layer))
    run.layers[layer].scaling = 0.5
    with pytest.raises(NotApplicable, match="no number of it multiplies its scores"):
        SoftenLogits().apply(run, growth(layer))
    assert run.layers[layer].scaling == 0.5


@pytest.mark.parametrize(
    ("name", "reason"),
    [("llama-sdpa", "change of architecture"), ("gpt2-sdpa", "change of architecture")],
)
def test_a_softcap_is_never_pretended(name: str, reason: str) -> None:
    run = ready(name)
    with pytest.raises(NotApplicable, match=reason) as error:
        LogitSoftcap().apply(run, growth(first_layer(run)))
    assert "torch.tanh" in error.value.advice


def test_a_softcap_holds_on_the_logits() -> None:
    from stabmon.interventions.run.score_replay import replay

    run = ready("gemma2-eager")
    LogitSoftcap(cap=0.5).apply(run, growth(first_layer(run)))
    caps: list[float | None] = []
    replay(run, lambda call: caps.append(call.softcap))
    assert caps == [0.5, 2.0]


def test_stop_is_asked_for_and_taken_back() -> None:
    run = TrainingRun(nn.Linear(1, 1))
    applied = Stop(why="three rollbacks did not help").apply(run)
    assert run.stop_reason == "three rollbacks did not help"
    applied.undo()
    assert run.stop_reason is None


def test_a_callback_that_fails_is_left_out_and_the_others_go_on() -> None:
    run = TrainingRun(nn.Linear(1, 1))
    called = []
    run.step_hooks.add("on_step", lambda: 1 / 0)
    run.step_hooks.add("on_step", lambda: called.append(1))
    run.step_hooks.fire("on_step")
    run.step_hooks.fire("on_step")
    assert called == [1, 1]


class Written(nn.Module):
    """Attention whose loop writes its temperature, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.sharpness = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5 * self.sharpness)


def test_a_temperature_holds_while_the_loop_writes_the_scale_at_each_step() -> None:
    torch.manual_seed(0)
    model, used = nn.Sequential(Written()), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(monitor: stabmon.AttentionStabilityMonitor) -> None:
        model[0].sharpness = 3.0
        loss = model(torch.randn(2, 8, 16)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        diagnosis = monitor.on_step(loss=loss)
        assert diagnosis is not None
        used.append(diagnosis.readings[-1].info["0"].scale)

    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        step(monitor)
        step(monitor)
        issue = StabilityIssue(2, "0", None, "logit_growth", "error", 9.0, 1.0, "")
        held = monitor.apply(SoftenLogits(temperature=3.0).aimed_at([issue]))
        assert held is not None
        step(monitor)
        step(monitor)
        assert held.undo()
        step(monitor)
    assert used == pytest.approx([1.5, 1.5, 0.5, 0.5, 1.5])
    assert model[0].sharpness == 3.0
