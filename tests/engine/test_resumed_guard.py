"""A guarded run in a plain loop, killed and resumed: its records, and where it can go back to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabmon
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.records import Reading
from tests.support.intervention_runs import run_of
from tests.support.small_runs import batches, gpt2, optimizer_of, train


def guarded(folder: Path | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model,
        optimizer,
        config="guard",
        log_every=1,
        schedule="fixed",
        run_dir=folder,
        sinks=["jsonl"] if folder else [],
    )
    return model, optimizer, monitor


def killed(folder: Path | None = None, steps: int = 6) -> dict[str, Any]:
    """Return the checkpoint of a run that ended without closing its monitor."""
    model, optimizer, monitor = guarded(folder)
    train(model, monitor, optimizer, batches(steps))
    found = {
        "model": {name: each.clone() for name, each in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "monitor": monitor.state_dict(),
    }
    monitor.close()
    return found


def test_a_resumed_run_goes_on_as_the_same_run_with_each_audit_record_once(tmp_path: Path) -> None:
    stored = killed(tmp_path)
    model, optimizer, monitor = guarded(tmp_path)
    model.load_state_dict(stored["model"])
    monitor.load_state_dict(stored["monitor"])
    train(model, monitor, optimizer, batches(3))
    monitor.close()
    records = stabmon.read_records(tmp_path)
    assert [each["run"] for each in records.meta["starts"]] == [1, 1]
    assert [each.step for each in records.readings] == list(range(1, 10))
    assert [each["intervention"] for each in records.interventions] == ["skip_step"]


def test_a_guarded_run_without_a_step_leaves_no_file(tmp_path: Path) -> None:
    _, _, monitor = guarded(tmp_path)
    monitor.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("weights_first", [True, False])
def test_there_is_a_state_to_go_back_to_from_the_first_step_after_a_resume(
    with_state: bool, weights_first: bool
) -> None:
    stored = killed()
    model, optimizer, monitor = guarded()

    def load_weights() -> None:
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])

    if weights_first:
        load_weights()
    if with_state:
        monitor.load_state_dict(stored["monitor"])
    else:
        monitor.step = 6
    if not weights_first:
        load_weights()
    train(model, monitor, optimizer, batches(1))
    kept = monitor._guard.run.find_prepared(HealthyStates).newest
    assert kept is not None, stored["monitor"]["guard"]["states"]
    assert kept.step == 6
    assert all(
        kept.tensors[name].equal(each)
        for name, each in stored["model"].items()
        if name in kept.tensors
    )
    assert not monitor.errors
    monitor.close()


def test_a_state_of_a_run_in_trouble_is_not_gone_back_to() -> None:
    run = run_of("gpt2-sdpa", steps=1)
    states = HealthyStates(run)
    assert states.state_dict()["is_healthy"]
    states.offer(False)
    assert not states.state_dict()["is_healthy"]
    states.offer(True)
    assert states.state_dict()["is_healthy"]
    for step in range(2, 30):
        run.history.add(Reading(step, 5.0 - 0.1 * step, {}))
    assert states.state_dict()["is_healthy"]
    for step in range(30, 34):
        run.history.add(Reading(step, 9.0, {}))
    assert not states.state_dict()["is_healthy"], "the loss left its course"


def test_how_far_groups_usually_move_is_known_after_a_resume() -> None:
    stored = killed()["monitor"]
    _, _, monitor = guarded()
    monitor.load_state_dict(stored)
    usual = monitor._parts.settings._per_rate
    assert [len(each) for each in usual.values()] == [5]
    assert all(0 < value < 1e4 for each in usual.values() for value in each)
    assert monitor.state_dict()["usual_updates"] == stored["usual_updates"]
    monitor.close()


@pytest.mark.parametrize("manual", [True, False])
def test_a_checkpoint_knows_the_weights_after_its_step(manual: bool) -> None:
    """The callbacks write it before the next step begins."""
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, log_every=1, schedule="fixed", sinks=[], manual_steps=manual
    )
    for tokens in batches(2):
        if manual:
            monitor.begin_step()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if manual:
            monitor.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        monitor.on_step()
    norms = monitor.state_dict()["parts"]["norms"]
    expected = [each.detach().norm().item() for each in model.parameters()]
    assert norms == pytest.approx(expected, rel=1e-5)
    monitor.close()


def test_the_state_of_a_resume_in_trouble_is_the_last_resort_of_weights_that_are_nan() -> None:
    stored = killed()
    states = stored["monitor"]["guard"]["states"]
    assert states["is_healthy"]
    states["is_healthy"] = False
    model, optimizer, monitor = guarded()
    model.load_state_dict(stored["model"])
    monitor.load_state_dict(stored["monitor"])
    ids = batches(1)[0]
    model(input_ids=ids, labels=ids)
    kept = monitor._guard.run.find_prepared(HealthyStates)
    assert kept.newest is None
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    assert kept.newest is not None
    assert kept.newest.step == 6
    with torch.no_grad():
        model.load_state_dict(stored["model"])
    train(model, monitor, optimizer, batches(4))
    assert kept.newest is not None, "a healthy state has taken its place"
    monitor.close()


def test_a_state_from_right_after_a_rollback_is_resumed() -> None:
    model, optimizer, monitor = guarded()
    train(model, monitor, optimizer, batches(6))
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    train(model, monitor, optimizer, batches(1))
    assert [each.intervention.name for each in monitor.applied if each.step] == ["rollback"]
    state = monitor.state_dict()
    monitor.close()
    *_, resumed = guarded()
    resumed.load_state_dict(state)
    assert resumed.step == 7
    resumed.close()
