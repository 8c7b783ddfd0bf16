"""Interventions through the front doors: by a person in a loop of their own, and by themselves
under guard.
"""

import copy
import json

import pytest
import torch
from torch import nn

import stabmon
from stabmon.config import load_config
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.soften_logits import SoftenLogits
from stabmon.records import StabilityIssue
from tests.support.small_runs import clean, gpt2, lines, llama, optimizer_of, same_bits, weights

LENGTH, ILL_AT = 48, 8


def tokens(step, rows=4):
    return torch.randint(0, 32, (rows, LENGTH), generator=torch.Generator().manual_seed(step))


def spoil(model, factor=60.0):
    """W_q and W_k of the first layer, all heads."""
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(factor)


def go(model, monitor, optimizer, steps, start=0, ill_at=ILL_AT, between=None):
    """Train; ``between(diagnosis)`` is called after each step. Gives the losses."""
    losses = []
    for step in range(start + 1, start + steps + 1):
        optimizer.zero_grad()
        loss = model(tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        if step == ill_at:
            spoil(model)
        losses.append(loss.item())
        diagnosis = monitor.on_step(loss=loss) if monitor else None
        if between:
            between(diagnosis)
    return losses


def guarded(model, optimizer, folder=None, config="guard", **options):
    return stabmon.AttentionStabilityMonitor(
        model,
        optimizer,
        config=config,
        log_every=1,
        sinks=["jsonl"] if folder else [],
        run_dir=folder,
        **options,
    )


def test_under_guard_what_grew_is_clipped_audited_and_the_model_left_clean(tmp_path):
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = guarded(model, optimizer, tmp_path)
    go(model, monitor, optimizer, ILL_AT + 6)
    assert not monitor.errors
    clip = next(each for each in monitor.applied if each.intervention.name == "qk_clip")
    assert clip.step == ILL_AT + 1
    assert {layer for layer, _ in clip.effect.places} == {f"transformer.h.{n}.attn" for n in (0, 1)}
    newest = monitor._tracker.history.latest.layers["transformer.h.0.attn"]["max_logit"]
    jumped = {
        issue.head: issue.value
        for issue in monitor.issues
        if issue.issue_type == "logit_growth" and issue.is_alarm
    }
    assert all(newest[head] < value / 2 for head, value in jumped.items())
    audit = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert [(each["intervention"], each["action"]) for each in audit][:2] == [
        ("skip_step", "applied"),
        ("qk_clip", "applied"),
    ]
    assert audit[1]["before"]["max_logit"]
    assert audit[1]["why"].startswith("logit_growth") or "logit_growth" in audit[1]["why"]
    monitor.close()
    assert clean(model)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_healthy_run_under_guard_is_bit_for_bit_what_it_is_without():
    plain, watched = gpt2(0.1), gpt2(0.1)
    torch.manual_seed(0)
    expected = go(plain, None, optimizer_of(plain), 10, ill_at=None)
    torch.manual_seed(0)
    optimizer = optimizer_of(watched)
    with guarded(watched, optimizer) as monitor:
        assert go(watched, monitor, optimizer, 10, ill_at=None) == expected
        assert [each.intervention.name for each in monitor.applied] == ["skip_step"]
        assert not monitor.errors
    assert same_bits(weights(plain), weights(watched))


def test_under_observe_a_person_applies_what_is_proposed_and_undoes_it_to_the_bit():
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, config="observe", log_every=1, sinks=[]
    )
    done = []

    def between(diagnosis):
        if done or not diagnosis.has_issues():
            return
        intervention = monitor.get_intervention(diagnosis)
        if intervention is None:
            return
        before = weights(model)
        applied = monitor.apply(intervention)
        assert not same_bits(before, weights(model))
        assert applied.undo()
        assert same_bits(before, weights(model))
        done.append(monitor.apply(intervention.aimed_at(intervention.issues)))

    go(model, monitor, optimizer, ILL_AT + 4, between=between)
    assert not monitor.errors
    assert [each.intervention.name for each in done] == ["qk_clip"]
    assert done[0].active, "what a person applied is not taken back unasked"
    monitor.close()
    assert clean(model)


def test_observe_proposes_nothing_for_a_healthy_run_and_does_nothing_by_itself():
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        go(
            model,
            monitor,
            optimizer,
            4,
            between=lambda d: (
                (d and monitor.get_intervention(d) is None) or pytest.fail("proposed")
            ),
        )
        go(model, monitor, optimizer, ILL_AT, start=4)
        assert any(issue.is_alarm for issue in monitor.issues)
        assert monitor.applied == ()


def test_what_does_not_fit_is_refused_and_told(tmp_path):
    from stabmon.interventions import INTERVENTIONS

    model = gpt2()
    with stabmon.AttentionStabilityMonitor(
        model, None, log_every=1, sinks=["jsonl"], run_dir=tmp_path
    ) as monitor:
        assert monitor.apply(INTERVENTIONS["lower_learning_rate"]()) is None
        assert not monitor.errors
    (record,) = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert record["action"] == "refused"
    assert "optimizer" in record["why"]


def test_a_resumed_monitor_holds_what_was_held(tmp_path):
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = guarded(
        model,
        optimizer,
        tmp_path,
        interventions={"lower_learning_rate": {"factor": 0.25}},
        budget={"patience": 50},
    )
    go(model, monitor, optimizer, ILL_AT + 3)
    assert monitor._guard.run.rate_factor == 0.25
    state = json.loads(json.dumps(monitor.state_dict()))
    kept_model, kept_optimizer = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    rest = go(model, monitor, optimizer, 4, start=ILL_AT + 3)
    monitor.close()

    again = gpt2()
    again.load_state_dict(kept_model)
    other = optimizer_of(again, 1e-3)
    other.load_state_dict(kept_optimizer)
    resumed = guarded(
        again,
        other,
        tmp_path,
        interventions={"lower_learning_rate": {"factor": 0.25}},
        budget={"patience": 50},
    )
    resumed.load_state_dict(state)
    assert [each.intervention.name for each in resumed.applied] == ["lower_learning_rate"]
    assert resumed._guard.run.rate_factor == 0.25
    assert go(again, resumed, other, 4, start=ILL_AT + 3) == rest
    assert not resumed.errors
    resumed.close()


def test_a_nan_is_skipped_under_guard_and_training_goes_on():
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    with guarded(model, optimizer) as monitor:
        go(model, monitor, optimizer, 3, ill_at=None)
        optimizer.zero_grad()
        loss = model(tokens(4), labels=tokens(4)).loss
        (loss * float("nan")).backward()
        optimizer.step()
        monitor.on_step(loss=loss)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        losses = go(model, monitor, optimizer, 3, start=4, ill_at=None)
        assert all(loss == loss for loss in losses)
        assert not monitor.errors


def test_stop_is_told():
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    with guarded(model, optimizer, interventions={"stop": {}}) as monitor:
        go(model, monitor, optimizer, 2, ill_at=None)
        assert monitor.stop_reason is None
        with torch.no_grad():
            model.transformer.wte.weight[0, 0] = float("nan")
        go(model, monitor, optimizer, 2, start=2, ill_at=None)
        assert "non_finite" in monitor.stop_reason


def test_configurations_of_interventions_are_checked_and_kept():
    assert set(load_config("guard").make_interventions()) == {
        "cap_query_key_norm",
        "cap_scale",
        "qk_clip",
        "soften_logits",
        "cap_learning_rate",
        "cap_query_key_update",
        "skip_step",
        "rollback",
    }
    assert load_config("observe").make_interventions() == {}
    assert load_config("guard").to_dict()["interventions"]["qk_clip"] == {"heads": "all"}
    for bad, words in {
        "interventions": ({"qk_clop": {}}, "qk_clop"),
        "budget": ({"actz": 3}, "actz"),
    }.values():
        key = "interventions" if "qk_clop" in bad else "budget"
        with pytest.raises(ValueError, match=words):
            load_config("observe", **{key: bad})
    with pytest.raises(ValueError, match="temperature"):
        load_config("observe", interventions={"soften_logits": {"temperature": 0}})


def test_a_layer_of_no_attention_under_guard_trains_on():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with guarded(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).sum()
            loss.backward()
            optimizer.step()
            monitor.on_step(loss=loss)
        assert set(monitor.errors) <= {"sampling"}


def test_weights_that_are_spoilt_again_within_the_cooldown_are_an_issue_and_gone_back_from(
    tmp_path,
):
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = guarded(model, optimizer, tmp_path, cooldown=1000)

    def spoil_with_nan(diagnosis):
        if monitor.step in (8, 15):
            with torch.no_grad():
                model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan

    losses = go(model, monitor, optimizer, 18, ill_at=0, between=spoil_with_nan)
    assert not monitor.errors
    assert [step for step, loss in enumerate(losses, 1) if loss != loss] == [9, 16]
    issues = [each for each in monitor.issues if each.issue_type == "non_finite"]
    assert [(each.step, each.state) for each in issues if each.is_alarm] == [
        (9, "opened"),
        (16, "opened"),
    ]
    audit = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert [each["step"] for each in audit if each["intervention"] == "rollback"] == [9, 16]


def test_an_alarm_that_a_release_brings_back_is_told_at_once():
    model = llama()
    optimizer = optimizer_of(model, 1e-4)

    def grow(diagnosis):
        if monitor.step == ILL_AT:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.mul_(3000.0)

    with guarded(model, optimizer, config="observe", cooldown=1000) as monitor:
        go(model, monitor, optimizer, ILL_AT + 1, ill_at=0, between=grow)
        alarms = {each.key: each for each in monitor.open_issues if each.is_alarm}
        assert alarms
        held = monitor.apply(SoftenLogits(temperature=3000.0).aimed_at(list(alarms.values())))
        go(model, monitor, optimizer, 6, start=ILL_AT + 1, ill_at=0)
        assert not [each for each in monitor.open_issues if each.is_alarm]
        held.undo()
        go(model, monitor, optimizer, 1, start=ILL_AT + 7, ill_at=0)
        assert alarms.keys() & {each.key for each in monitor.open_issues if each.is_alarm}


def test_layers_that_were_treated_are_no_longer_at_their_start():
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    with guarded(model, optimizer, config="observe") as monitor:
        go(model, monitor, optimizer, 1, ill_at=0)
        history, layers = monitor._tracker.history, [f"transformer.h.{at}.attn" for at in (0, 1)]
        assert [history.is_at_start(layer) for layer in layers] == [True, True]
        issue = StabilityIssue(1, layers[0], None, "logit_growth", "error", 1.0, 0.5, "")
        assert monitor.apply(QkClip(target=1e-3, issues=(issue,)))
        assert [history.is_at_start(layer) for layer in layers] == [False, True]
        state = monitor.state_dict()
    twin = gpt2()
    with guarded(twin, optimizer_of(twin, 1e-3), config="observe") as resumed:
        resumed.load_state_dict(state)
        go(twin, resumed, resumed.optimizer, 1, start=1, ill_at=0)
        assert not any(map(resumed._tracker.history.is_at_start, layers))


def test_a_rollback_from_labels_that_are_noise_is_taken_back(tmp_path):
    model = gpt2()
    optimizer = optimizer_of(model, 3e-3)
    with guarded(model, optimizer, tmp_path) as monitor:
        for step in range(1, 91):
            inputs = (torch.arange(LENGTH) + step) % 32
            labels = tokens(step, 4) if step > 60 else inputs.expand(4, -1)
            optimizer.zero_grad()
            loss = model(inputs.expand(4, -1), labels=labels).loss
            loss.backward()
            optimizer.step()
            monitor.on_step(loss=loss)
        rollbacks = [each for each in monitor.applied if each.intervention.name == "rollback"]
        assert len(rollbacks) == 1
        assert not rollbacks[0].active
    audit = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert [each["action"] for each in audit[1:]] == ["applied", "undone", "gave_up"]
    assert "leapt at step 61" in audit[-1]["why"]
