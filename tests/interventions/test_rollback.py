"""A rollback brings back every bit of a state that is known to be healthy, and nothing of the
data's place in the run.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stabmon._storage.stored_value import Stored
from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.rollback import Rollback
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.interventions.run.snapshots import Snapshot, _restore_entries, snapshot_bytes
from stabmon.records import Reading
from stabmon.rules.tracking.history import History
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    loss_of,
    run_of,
    scores_of,
    train_step,
)


def spoilt(
    states: dict[str, float] | None = None, folder: Path | None = None
) -> tuple[TrainingRun, dict[str, object]]:
    """A run that was healthy after step 2 and is NaN after step 5, and its bits of then."""
    run = run_of("gpt2-sdpa", steps=2)
    run.run_dir = folder
    run.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
    run.prepared = [HealthyStates(run, every=1, confirm=1, **(states or {}))]
    run.prepared[0].offer(True)
    run.optimizer.zero_grad()
    healthy = all_bits(run)
    train_step(run)
    run.lr_scheduler.step()
    run.prepared[0].offer(True)
    train_step(run)
    run.lr_scheduler.step()
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    train_step(run)
    run.lr_scheduler.step()
    run.prepared[0].offer(False)
    run.optimizer.zero_grad()
    torch.manual_seed(99)
    return run, healthy


def without(bits: dict[str, object], *words: str) -> dict[str, object]:
    return {name: value for name, value in bits.items() if not any(word in name for word in words)}


def test_weights_and_moments_are_back_bit_for_bit_and_random_state_and_schedule_are_where_they_were() -> (
    None
):
    run, healthy = spoilt()
    random, rate, epoch = (
        torch.get_rng_state(),
        run.optimizer.param_groups[0]["lr"],
        run.lr_scheduler.last_epoch,
    )
    applied = Rollback().apply(run)
    assert (
        differences(
            without(healthy, "random", " lr", "initial_lr"),
            without(all_bits(run), "random", " lr", "initial_lr"),
        )
        == []
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert (run.optimizer.param_groups[0]["lr"], run.lr_scheduler.last_epoch, run.step) == (
        rate,
        epoch,
        5,
    )
    assert (applied.record["before"], applied.record["after"]) == (
        {"state_of_step": 5},
        {"state_of_step": 2},
    )
    assert "back to the state after step 2, 3 steps ago" in applied.record["note"]


def test_the_schedule_goes_back_too_if_asked() -> None:
    run, _ = spoilt()
    Rollback(rewind_schedule=True).apply(run)
    assert run.lr_scheduler.last_epoch == 0
    assert run.optimizer.param_groups[0]["lr"] == 1e-2


def test_training_after_a_rollback_is_bit_for_bit_training_from_the_healthy_state() -> None:
    run, _ = spoilt()
    Rollback(rewind_schedule=True).apply(run)
    plain = run_of("gpt2-sdpa", steps=2)
    for each in (plain, run):
        train_step(each)
    assert (
        differences(
            without(all_bits(plain), "random", "initial_lr"),
            without(all_bits(run), "random", "initial_lr"),
        )
        == []
    )


def test_undone_the_spoilt_state_is_back_bit_for_bit() -> None:
    run, _ = spoilt()
    before = all_bits(run)
    applied = Rollback().apply(run)
    assert differences(before, all_bits(run))
    assert applied.undo()
    assert differences(before, all_bits(run)) == []


def test_states_too_large_for_memory_go_to_disk_and_survive_a_restart(tmp_path: Path) -> None:
    run, healthy = spoilt({"memory_gb": 0.0}, tmp_path)
    assert run.prepared
    state = run.prepared[0].state_dict()
    assert (tmp_path / state["healthy"]).is_file()
    assert len(list(tmp_path.glob("*.pt"))) == 1, "older ones are deleted"
    fresh = run_of("gpt2-sdpa", steps=4)
    fresh.run_dir = tmp_path
    fresh.prepared = [HealthyStates(fresh, memory_gb=0.0)]
    fresh.prepared[0].parse_state(Stored(state))()
    fresh.optimizer.zero_grad()
    applied = Rollback().apply(fresh)
    assert (
        differences(
            without(healthy, "random", "initial_lr"),
            without(all_bits(fresh), "random", "initial_lr"),
        )
        == []
    )
    applied.release()
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_without_memory_and_folder_nothing_is_kept_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, _ = spoilt({"memory_gb": 0.0})
    with pytest.raises(NotApplicable, match="no healthy state"):
        Rollback().apply(run)
    assert caplog.text.count("No state is kept") == 1


def test_a_state_counts_only_after_more_samples_were_healthy() -> None:
    run = run_of("gpt2-sdpa", steps=1)
    states = HealthyStates(run, every=2, confirm=2)
    newest = []
    for healthy in [True, True, True, False, True, True, False, True, True, True, True]:
        run.step += 1
        states.offer(healthy)
        newest.append(None if states.newest is None else states.newest.step)
    assert newest == [None, None, 2, 2, 2, 2, 2, 2, 2, 2, 10]


def test_a_clip_made_after_the_state_was_taken_is_forgotten_with_it_and_remembered_when_the_rollback_is_undone() -> (
    None
):
    run, _ = spoilt()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.nan_to_num_(0.1)
    layer = first_layer(run)
    applied = QkClip(target=float(scores_of(run)[layer][1]) / 3, hold=False).apply(
        run, growth(layer)
    )
    back = Rollback().apply(run)
    healthy = all_bits(run)
    applied.effect.undo()
    assert differences(healthy, all_bits(run)) == []
    back.undo()


def test_a_snapshot_is_as_large_as_it_says() -> None:
    run = run_of("gpt2-sdpa", steps=1)
    snapshot = Snapshot.take(run)
    tensors = [
        *snapshot.tensors.values(),
        *(v for entries in snapshot.optimizer for v in entries.values()),
    ]
    assert snapshot_bytes(run) == sum(
        t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)
    )


def test_numbers_of_an_optimizer_are_made_anew_on_the_device_that_they_were_on() -> None:
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "note": "kept"}
    for beside, device in ((["step"], "meta"), ([], "cpu")):
        entries: dict[str, Any] = {}
        _restore_entries(entries, saved, torch.device("meta"), beside)
        assert entries["step"].device.type == device
        assert entries["exp_avg"].device.type == "meta"
        assert entries["note"] == "kept"


@pytest.mark.parametrize("fused", [False, True])
def test_a_snapshot_knows_the_device_of_an_optimizers_numbers(fused: bool, tmp_path: Path) -> None:
    run = run_of("gpt2-sdpa", functools.partial(torch.optim.AdamW, fused=fused), steps=1)
    snapshot = Snapshot.take(run)
    assert {tuple(names) for names in snapshot.beside} == {("step",)}  # here all are on the CPU
    snapshot.save(tmp_path / "state.pt")
    before = all_bits(run)
    run.optimizer.state.clear()
    Snapshot.load(tmp_path / "state.pt").restore(run, schedule=True)
    assert differences(before, all_bits(run)) == []
    older = replace(snapshot, beside=[])  # a file of an earlier version
    run.optimizer.state.clear()
    older.restore(run, schedule=True)
    assert differences(before, all_bits(run)) == []


def test_a_rate_held_as_a_tensor_is_restored_into_that_tensor() -> None:
    run = run_of("gpt2-sdpa", steps=1)
    rate = torch.tensor(0.5)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    snapshot = Snapshot.take(run)
    rate.fill_(0.25)
    snapshot.restore(run, schedule=False)
    assert rate == 0.25
    snapshot.restore(run, schedule=True)
    assert rate == 0.5
    assert all(group["lr"] is rate for group in run.optimizer.param_groups)


def test_without_states_it_refuses() -> None:
    with pytest.raises(NotApplicable, match="from the start"):
        Rollback().apply(run_of("gpt2-sdpa"))


def course(losses: list[float], healthy: bool = True) -> HealthyStates:
    """States of a run that began at step 0 and had these losses since, offered at every step."""
    run = run_of("gpt2-sdpa")
    run.history = History()
    states = HealthyStates(run, every=2, confirm=1)
    run.prepared = [states]
    states.begin()
    for step, loss in enumerate(losses, start=1):
        run.step = step
        run.history.add(Reading(step, loss, {}))
        states.offer(healthy)
    return states


def test_the_beginning_is_kept_until_the_loss_has_proven_the_run_better() -> None:
    assert course([5.0] * 12 + [4.9, 5.1]).newest.step == 0, "no better than it began"
    assert course([5.0, 4.9, 4.8, 4.6, 4.5, 4.3, 4.2, 4.0, 3.9, 3.8, 3.7, 3.6]).newest.step > 0
    assert course([5.0, 4.0, 3.0, 2.9, 2.8], healthy=False).newest.step == 0


def test_a_state_that_was_ruined_without_an_alarm_takes_no_healthy_one_s_place() -> None:
    falling = [5.0 - 0.1 * step for step in range(20)]
    before = course(falling).newest.step
    assert before > 10
    after = course([*falling, *[6.0 + 0.01 * step for step in range(10)]])
    assert after.newest.step <= len(falling)


def test_begun_again_the_first_state_is_back_bit_for_bit() -> None:
    run = run_of("gpt2-sdpa")
    run.optimizer.zero_grad()
    before = all_bits(run)
    states = HealthyStates(run, every=1, confirm=1)
    run.prepared = [states]
    states.begin()
    train_step(run)
    states.offer(False)
    told: list[int] = []
    run.on_rollback.append(told.append)
    applied = Rollback().apply(run)
    run.optimizer.zero_grad()
    assert differences(without(before, "random"), without(all_bits(run), "random")) == [], (
        "moments were not there yet"
    )
    assert told == [0]
    assert "the state in which training began" in applied.record["note"]


def test_no_rollback_goes_to_a_state_that_is_worse_than_where_the_run_stands() -> None:
    states = course([5.0 - 0.1 * step for step in range(30)])
    with pytest.raises(NotApplicable, match="the run stands no worse than it ever did"):
        Rollback().apply(states.run)
    states.run.history.add(Reading(31, 9.0, {}))
    states.run.history.add(Reading(32, 8.0, {}))
    states.run.step = 32
    applied = Rollback().apply(states.run)
    assert applied.record["after"]["state_of_step"] == states.newest.step


def test_no_rollback_goes_back_to_a_loss_that_was_above_the_present_one() -> None:
    falling = [5.0 - 0.05 * step for step in range(40)]
    states = course(falling[:6])
    kept = states.newest.step
    for step, loss in enumerate([*falling[6:], 3.4, 3.4, 3.4], start=7):  # an alarm is open
        states.run.step = step
        states.run.history.add(Reading(step, loss, {}))
        states.offer(False)
    assert states.newest.step == kept < 7
    with pytest.raises(NotApplicable, match=r"stands at loss 3\.4, and stood at"):
        Rollback().apply(states.run)


@pytest.mark.parametrize(("after", "is_taken_back"), [(9.5, True), (4.0, False), (8.0, True)])
def test_a_rollback_after_which_batches_are_as_hard_is_a_failure(
    after: float, is_taken_back: bool
) -> None:
    states = course([5.0 - 0.1 * step for step in range(30)])
    run = states.run
    for run.step in (31, 32, 33):
        run.history.add(Reading(run.step, 8.0, {}))
    before = all_bits(run)
    applied = Rollback().apply(run)
    for run.step in (34, 35):
        run.history.add(Reading(run.step, after, {}))
        assert applied.effect.explain_failure() == "", "two losses may be chance"
    run.step = 36
    run.history.add(Reading(36, after, {}))
    assert ("batches or labels" in applied.effect.explain_failure()) == is_taken_back
    if is_taken_back:
        assert applied.undo()
        assert differences(before, all_bits(run)) == []
        assert applied.effect.explain_failure() == "", "told once"


def test_weights_that_are_spoilt_are_gone_back_from_though_the_loss_does_not_show_it() -> None:
    states = course([5.0 - 0.1 * step for step in range(30)])
    with torch.no_grad():
        next(states.run.model.parameters())[0] = float("nan")
    assert Rollback().apply(states.run).active


def test_every_optimizer_and_every_schedule_goes_back_also_from_disk(tmp_path: Path) -> None:
    run = run_of("llama-sdpa", optimizer=None)
    inner = [p for name, p in run.model.named_parameters() if "self_attn" in name and p.ndim == 2]
    outer = [p for p in run.model.parameters() if all(p is not each for each in inner)]
    muon, adamw = torch.optim.Muon(inner, lr=0.1), torch.optim.AdamW(outer, 1e-2)
    run.optimizer, run.lr_scheduler = (
        (muon, adamw),
        [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (muon, adamw)],
    )

    def step() -> None:
        loss_of(run.model, run.inputs).backward()
        for each in (*run.optimizer, *run.lr_scheduler):
            each.step()
        muon.zero_grad()
        adamw.zero_grad()

    def bits() -> list[torch.Tensor]:
        moments = [
            v for each in run.optimizer for entries in each.state.values() for v in entries.values()
        ]
        rates = [
            torch.tensor(
                [group.rate for group in run.groups]
                + [each.last_epoch for each in run.lr_scheduler]
            )
        ]
        return [each.detach().clone() for each in (*run.model.parameters(), *moments, *rates)]

    step()
    Snapshot.take(run).save(tmp_path / "state.pt")
    before, following = bits(), None
    for _ in range(2):
        step()
        step()
        assert following is None or all(map(torch.equal, bits(), following))
        following = bits()
        Snapshot.load(tmp_path / "state.pt").restore(run, schedule=True)
        assert len(before) == len(bits())
        assert all(map(torch.equal, bits(), before))
