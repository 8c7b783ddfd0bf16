"""A file is there as a whole or not at all: whatever stops the writing leaves the old one as it
was.
"""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

import stabmon.controllers.serialization as store
from stabmon._storage.atomic_write import replace_whole, write_text
from stabmon._storage.stored_value import Stored
from stabmon.controllers import attach_controllers, load_controllers, save_controllers
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.interventions.run.snapshots import Snapshot
from tests.support.intervention_runs import run_of
from tests.support.small_runs import gpt2


def test_what_is_cut_off_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_text(path, "old")

    def cut_off(fresh: Path) -> None:
        fresh.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        replace_whole(path, cut_off)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_damaged_snapshot_is_told_of_and_not_gone_back_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of("gpt2-sdpa", steps=1)
    run.run_dir = tmp_path
    path = tmp_path / "healthy-1-rank0.pt"
    Snapshot.take(run).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    states = HealthyStates(run)
    states.parse_state(Stored({"healthy": path.name}))()
    assert states.newest is None
    assert states.newest is None
    assert caplog.text.count("holds no state to go back to") == 1
    path.write_bytes(whole)
    assert Snapshot.load(path).step == 1
    torch.save({**torch.load(path, weights_only=True), "version": 2}, path)
    with pytest.raises(ValueError, match="of version 2, but this stabmon reads 1: update stabmon"):
        Snapshot.load(path)


def test_a_save_of_controllers_that_is_cut_off_between_its_files_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt2()
    attach_controllers(model, "info_density")
    save_controllers(model, tmp_path)
    old = json.loads((tmp_path / "controllers.json").read_text())
    other = gpt2()
    attach_controllers(other, "info_density", layers=[next(iter(old["layers"]))])
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_controllers(other, tmp_path)
    assert json.loads((tmp_path / "controllers.json").read_text()) == old
    assert list(load_controllers(gpt2(), tmp_path).by_layer()) == list(old["layers"])[:1]


@pytest.mark.parametrize("damage", ["", "{", "[" * 100_000, '{"step": 3}', "\x00\xff", "cut"])
def test_a_damaged_state_in_a_checkpoint_costs_one_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import TrainerState, TrainingArguments

    from stabmon.integrations.transformers import StabilityCallback

    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    stored = (Path(__file__).parents[1] / "states" / "transformers_0.json").read_text()
    (folder / "stabmon_state.json").write_text(stored[:3000] if damage == "cut" else damage)
    callback, state = StabilityCallback("guard", log_every=2, sinks=[]), TrainerState(global_step=4)
    model = gpt2()
    with caplog.at_level(logging.WARNING, "stabmon"):
        optimizer = torch.optim.AdamW(model.parameters())
        callback.on_train_begin(
            TrainingArguments(str(tmp_path), use_cpu=True),
            state,
            None,
            model=model,
            optimizer=optimizer,
        )
        callback.on_step_begin(None, state, None)
    told = [each.getMessage() for each in caplog.records if each.name == "stabmon"]
    assert len(told) == 1
    assert "starts with an empty history" in told[0]
    assert callback.monitor is not None
    assert [each.intervention.name for each in callback.monitor.applied] == ["skip_step"]
    callback.close()
