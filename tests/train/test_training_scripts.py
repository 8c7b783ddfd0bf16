"""Each script trains, resumes exactly and injects its faults, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from settings import SettingsError

from stabmon.sinks.reader import read_records
from tests.support.sweeps import sweep

ROOT = Path(__file__).parents[2]
LAST_CHECKPOINT = {
    "plain_loop": "checkpoints/step=6.pt",
    "hf_gpt": "checkpoint-6",
    "lightning_gpt": "checkpoints/step=6.ckpt",
}

WATCHED = "stabmon={config: observe, log_every: 2}"

Train = Callable[..., dict[int, float]]
any_script = pytest.mark.parametrize("script", sweep(LAST_CHECKPOINT, keep=1))


@any_script
def test_a_resumed_run_goes_on_as_if_never_interrupted(
    script: str, run: Train, tmp_path: Path
) -> None:
    provoked = ("provoke=scale_qk", "scale_qk.start=2", "scale_qk.steps=4", "scale_qk.factor=3")
    watched = (*provoked, "training.save_every=4", WATCHED)
    whole = run(script, "whole", *provoked)
    assert run(script, "killed", *watched) == whole
    forget(tmp_path / "killed" / LAST_CHECKPOINT[script])
    log = tmp_path / "killed" / "losses.jsonl"
    log.write_text(
        "".join(log.read_text().splitlines(keepends=True)[:5]) + '{"step": 6, "lo'
    )  # as a kill leaves it
    resumed = run(script, "killed", *watched, "resume=true")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["resumed_from_step"] == 4
    assert list(resumed) == [1, 2, 3, 4, 5, 6]
    assert resumed == whole
    assert [reading.step for reading in read_records(tmp_path / "killed").readings] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@any_script
def test_paired_runs_have_the_same_losses_and_another_seed_has_others(
    script: str, run: Train
) -> None:
    healthy = run(script, "healthy")
    assert run(script, "paired") == healthy
    assert run(script, "other", "seed=1") != healthy


@any_script
def test_scaling_queries_and_keys_changes_the_losses_of_the_steps_after_it_alone(
    script: str, run: Train
) -> None:
    healthy = run(script, "healthy")
    provoked = run(
        script,
        "provoked",
        "provoke=scale_qk",
        "scale_qk.start=3",
        "scale_qk.steps=1",
        "scale_qk.factor=20",
    )
    assert [step for step in healthy if healthy[step] != provoked[step]] == [4, 5, 6]


@any_script
def test_a_high_learning_rate_changes_the_losses_after_the_first_update(
    script: str, run: Train
) -> None:
    healthy, provoked = (
        run(script, "healthy", "training.warmup=0"),
        run(script, "high", "training.warmup=0", "provoke=high_lr"),
    )
    assert [step for step in healthy if healthy[step] != provoked[step]] == [2, 3, 4, 5, 6]


@any_script
def test_watching_changes_no_loss_and_leaves_readings(
    script: str, run: Train, tmp_path: Path
) -> None:
    provoked = ("provoke=scale_qk", "scale_qk.start=3", "scale_qk.steps=1", "scale_qk.factor=20")
    watched = run(script, "watched", *provoked, WATCHED)
    assert watched == run(script, "unwatched", *provoked)
    readings = read_records(tmp_path / "watched").readings
    assert [reading.step for reading in readings] == [1, 2, 3, 4, 5, 6]
    before, after = (
        max(layer["max_logit"].max() for layer in reading.layers.values())
        for reading in (readings[1], readings[3])
    )
    assert after > 50 * before


@any_script
def test_a_wrong_preset_is_refused_before_anything_is_written(
    script: str, run: Train, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="stabmon: config 'obsreve' is neither a preset"):
        run(script, "wrong", "stabmon={config: obsreve}")
    assert not (tmp_path / "wrong").exists()


@any_script
def test_a_validation_on_the_way_changes_no_loss(script: str, run: Train) -> None:
    assert run(script, "often", "training.validate_every=2") == run(script, "never")


def test_gpt2_trains_too(run: Train) -> None:
    assert list(run("hf_gpt", "gpt2", "model.architecture=gpt2")) == [1, 2, 3, 4, 5, 6]


def test_lightning_and_the_plain_loop_train_the_same_model_alike(run: Train) -> None:
    assert run("lightning_gpt", "lightning") == run("plain_loop", "plain")


def test_a_run_in_the_folder_of_another_is_refused(run: Train) -> None:
    run("plain_loop", "taken")
    with pytest.raises(SettingsError, match="taken holds a run already: go on with resume=true"):
        run("plain_loop", "taken")


def test_nothing_to_resume_is_said(run: Train) -> None:
    with pytest.raises(SettingsError, match="holds no checkpoint"):
        run("plain_loop", "empty", "resume=true")


@pytest.mark.long
def test_the_command_line_ends_with_the_losses_or_in_one_line_what_is_wrong(
    text: Path, tmp_path: Path
) -> None:
    words = (
        "model.layers=1 model.width=16 corpus.block=32 training.steps=2 training.batch=2 "
        "stabmon=null"
    )

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "train/plain_loop.py",
            "configs/train_plain_loop.yaml",
            *words.split(),
            *more,
        ]
        return subprocess.run(
            [*command, f"run_dir={tmp_path / 'run'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    done = call("--text", str(text))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plain_loop: step 2, train loss 5.")
    assert "validation loss 5." in done.stdout
    wrong = call("--text", str(tmp_path / "missing.txt"))
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith("error: cannot read the text")


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint, so that the one before it is the last."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()
