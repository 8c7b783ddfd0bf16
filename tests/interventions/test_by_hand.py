"""What a person applies stays as long as they say, and is judged only on a batch of its own."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stabmon
from stabmon.guard import Budget, Guard, make_interventions
from stabmon.guard.trials import LEAST_STEPS
from stabmon.interventions import INTERVENTIONS
from stabmon.interventions.cap_query_key_norm import CapQueryKeyNorm
from stabmon.interventions.lower_learning_rate import LowerLearningRate
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.rollback import Rollback
from stabmon.interventions.soften_logits import SoftenLogits
from stabmon.records import StabilityIssue
from tests.support.intervention_runs import first_layer, growth, run_of, scores_of, train_step
from tests.support.small_runs import batches, gpt2, lines, llama, optimizer_of, train

FIRST = "transformer.h.0.attn"


def watched(
    folder: Path | None = None, model: torch.nn.Module | None = None, config: str = "observe"
) -> stabmon.AttentionStabilityMonitor:
    model = gpt2() if model is None else model
    monitor = stabmon.AttentionStabilityMonitor(
        model,
        optimizer_of(model, 1e-3),
        config=config,
        log_every=1,
        sinks=["jsonl"] if folder else [],
        run_dir=folder,
    )
    train(model, monitor, monitor.optimizer, batches(2))
    return monitor


def test_heads_held_at_a_target_stay_there_under_an_optimizer_beside_another(
    tmp_path: Path,
) -> None:
    tau = 2.0
    model = llama(num_key_value_heads=4)
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    outer = [p for p in model.parameters() if all(p is not each for each in inner)]
    muon, adamw = torch.optim.Muon(inner, lr=0.05, weight_decay=0.0), torch.optim.AdamW(outer, 3e-3)
    over, held = [], set()
    with stabmon.AttentionStabilityMonitor(
        model, muon, log_every=1, sinks=["jsonl"], run_dir=tmp_path
    ) as monitor:
        for ids in 40 * batches(1):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            for each in (muon, adamw):
                each.step()
                each.zero_grad()
            diagnosis = monitor.on_step(loss=loss.detach())
            scores = {
                (layer, head): float(v)
                for layer, s in diagnosis.stats.items()
                for head, v in enumerate(s["max_logit"])
            }
            over.append(max(scores.values()) / tau)
            for (layer, head), score in scores.items():
                if score > tau and (layer, head) not in held:
                    issue = StabilityIssue(
                        monitor.step, layer, head, "logit_growth", "error", score, tau, "clip", {}
                    )
                    held |= (
                        {(layer, head)}
                        if monitor.apply(INTERVENTIONS["qk_clip"](target=tau).aimed_at([issue]))
                        else set()
                    )
        assert not monitor.errors
        assert all(each.active for each in monitor.applied)
    told = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert len(held) > 4
    assert {each["action"] for each in told} <= {"applied", "again"}
    assert all(
        "proven on the step's batch" in each["note"] for each in told if each["action"] == "applied"
    )
    assert max(over[25:]) < 1.2, "a step of Muon above it"


def test_a_parameter_of_an_optimizer_that_was_not_given_is_clipped_itself() -> None:
    run = run_of("llama-sdpa")
    layer = first_layer(run)
    theirs = set(map(id, run.layers[layer].parameters()))
    run.optimizer = torch.optim.SGD([p for p in run.model.parameters() if id(p) not in theirs], 0.1)
    before = float(scores_of(run)[layer][1])
    QkClip(target=before / 4).apply(run, growth(layer))
    assert scores_of(run)[layer][1] == pytest.approx(before / 4, rel=1e-4)


def test_held_before_any_head_has_grown_it_clips_the_one_that_grows_later(tmp_path: Path) -> None:
    monitor = watched(tmp_path)
    issues = [
        StabilityIssue(2, layer, head, "logit_growth", "error", 1.0, 1.0, "")
        for layer in monitor._tracker.history.layers
        for head in range(4)
    ]
    before = [p.clone() for p in monitor.model.parameters()]
    applied = monitor.apply(QkClip(target=2.0).aimed_at(issues))
    assert applied is not None
    assert all(torch.equal(p, b) for p, b in zip(monitor.model.parameters(), before, strict=True))
    assert len(applied.effect.targets) == 8
    with torch.no_grad():
        monitor.model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(30)
    train(monitor.model, monitor, monitor.optimizer, batches(3, seed=2))
    assert monitor._tracker.history.readings[-3].layers[FIRST]["max_logit"].max() > 4.0
    assert monitor._tracker.history.latest.layers[FIRST]["max_logit"].max() < 2.2
    monitor.close()


@pytest.mark.parametrize("act", [SoftenLogits(), LowerLearningRate(), CapQueryKeyNorm()])
def test_not_held_it_is_in_force_for_one_step(
    act: stabmon.interventions.Intervention, tmp_path: Path
) -> None:
    monitor = watched(tmp_path)
    attention = monitor.model.transformer.h[0].attn
    scale, issue, used = attention.scaling, growth(FIRST), []
    applied = monitor.apply(act.aimed_at([issue]), hold=False)
    assert applied is not None
    assert applied.active
    attention.register_forward_pre_hook(lambda module, _: used.append(module.scaling))
    train(monitor.model, monitor, monitor.optimizer, batches(2))
    assert used == [scale / 4 if act.name == "soften_logits" else scale, scale]
    assert not applied.active
    assert attention.scaling == scale
    assert monitor._guard.run.rate_factor == 1.0
    released = lines(tmp_path / "stabmon" / "interventions.jsonl")[-1]
    assert (released["action"], "hold=False" in released["why"]) == ("released", True)
    monitor.close()


def test_a_clip_that_is_not_held_is_made_once_and_can_still_be_undone() -> None:
    monitor = watched()
    applied = monitor.apply(QkClip(target=0.01, hold=True).aimed_at([growth(FIRST)]), hold=False)
    assert applied is not None
    assert not monitor._guard.wants_attention
    train(monitor.model, monitor, monitor.optimizer, batches(1))
    assert applied.active
    applied.undo()
    monitor.close()


def test_what_cannot_be_held_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    monitor = watched(config="guard")
    assert monitor.apply(Rollback(), hold=True) is None
    assert "rollback is not applied: rollback is done at once and cannot be held" in caplog.text
    assert not monitor.errors
    monitor.close()


def test_held_over_a_restart_as_it_was_held() -> None:
    first = watched()
    first.apply(SoftenLogits().aimed_at([growth(FIRST)]), hold=False)
    first.apply(LowerLearningRate(factor=0.5))
    state = first.state_dict()
    first.close()
    second = watched()
    second.load_state_dict(state)
    assert [each.active for each in second.applied] == [True, True]
    assert all(each.by_user for each in second.applied)
    train(second.model, second, second.optimizer, batches(1))
    assert [each.active for each in second.applied] == [False, True]
    second.close()


def guard_of(by_hand: bool) -> Guard:
    """A guard on a run whose learning rate is halved for an alarm that stays open."""
    run = run_of("gpt2-sdpa", steps=1)
    guard = Guard(
        run,
        make_interventions({"lower_learning_rate": {"factor": 0.5}}),
        Budget(patience=2, release_after=2),
    )
    act = LowerLearningRate(factor=0.5).aimed_at([growth(first_layer(run))], "asked for")
    assert guard.apply(act, by_user=by_hand)
    return guard


def sample(guard: Guard, *alarms: StabilityIssue) -> None:
    """Train for as many steps as guard's trials count as one sample."""
    for _ in range(LEAST_STEPS):
        train_step(guard.run)
    guard.intervene(alarms, True)


@pytest.mark.parametrize("by_hand", [True, False])
def test_guard_takes_back_its_own_with_a_reason_and_never_a_persons(
    by_hand: bool, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guard_of(by_hand)
    run = guard.run
    alarm = replace(growth(first_layer(run)), issue_type="overflow_risk")
    guard.policy.trials.entries[0].keys = (("scores", alarm.layer, alarm.head),)
    guard.policy.budget = replace(guard.policy.budget, max_per_location=1)
    for _ in range(4):
        sample(guard, alarm)
    (applied,) = run.applied
    undone = [each for each in run.records if each["action"] == "undone"]  # type: ignore[attr-defined]
    assert applied.active == by_hand
    assert len(undone) == (not by_hand)
    assert all("still open after 2 samples" in each["why"] for each in undone)
    assert ("still open after 2 samples" in caplog.text) == (not by_hand)


@pytest.mark.parametrize("by_hand", [True, False])
def test_guard_lets_go_of_its_own_when_nothing_is_wrong_and_never_of_a_persons(
    by_hand: bool,
) -> None:
    guard = guard_of(by_hand)
    for _ in range(8):
        sample(guard)
    assert guard.run.applied[0].active == by_hand
    told = [each for each in guard.run.records if each["action"] == "released"]  # type: ignore[attr-defined]
    assert len(told) == (not by_hand)
    assert all("no alarm for" in each["why"] for each in told)


def test_a_persons_clip_that_does_nothing_is_told_of_and_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = guard_of(by_hand=True)
    guard.run.applied[0].effect.abandoned_reason = "the rows are others"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            guard.intervene([], True)
    assert caplog.text.count("does not help: the rows are others; undo it") == 1
    assert guard.run.applied[0].active


def test_a_persons_settings_that_do_not_fit_rule_out_nothing_of_guards() -> None:
    run = run_of("gpt2-sdpa")
    guard = Guard(run, make_interventions({"qk_clip": {"target": 0.1}}))
    alarm = replace(growth(first_layer(run)), threshold=0.01)
    assert guard.apply(QkClip(target=1e9, hold=False).aimed_at([alarm]), by_user=True) is None
    assert [each.intervention.name for each in guard.intervene([alarm], True)] == ["qk_clip"]
