"""Settings come from YAML and the command line; errors name place and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_loop import Settings
from settings import SettingsError, read_settings

ROOT = Path(__file__).parents[2]


def test_overrides_are_laid_over_the_file_however_deep() -> None:
    path = ROOT / "configs" / "train_plain_loop.yaml"
    plain = read_settings(Settings, path)
    words = [
        "training.learning_rate=3e-4",
        "model.qk_norm=true",
        "scale_qk.layers=[1, 2]",
        "stabmon=null",
        "loggers=[wandb]",
    ]
    other = read_settings(Settings, path, words)
    assert (plain.training.learning_rate, other.training.learning_rate) == (1e-3, 3e-4)
    assert (plain.model.qk_norm, other.model.qk_norm) == (False, True)
    assert other.scale_qk.layers == [1, 2]
    assert other.stabmon is None
    assert other.loggers == ["wandb"]
    assert other.training.steps == plain.training.steps


@pytest.mark.parametrize("name", ["plain_loop", "hf_gpt", "lightning_gpt"])
def test_the_files_in_configs_are_read_and_spell_out_every_default(name: str) -> None:
    module = __import__(name)
    settings = read_settings(module.Settings, ROOT / "configs" / f"train_{name}.yaml")
    assert settings.run_dir == f"runs/{name}"
    assert settings.provoke == "none"
    assert settings.model == module.Settings(run_dir="").model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run_dir: x\ntrainig: {}",
            "bad.yaml: trainig: unknown key, did you mean 'training'? Known: run_dir",
        ),
        (
            "run_dir: x\ntraining: {stepz: 3}",
            "bad.yaml: training.stepz: unknown key, did you mean 'steps'? Known: steps",
        ),
        (
            "run_dir: x\ntraining: {steps: many}",
            "bad.yaml: training.steps: 'many' must be a whole number of at least 1",
        ),
        (
            "run_dir: x\ntraining: {clip: yes}",
            "bad.yaml: training.clip: True must be a number above 0",
        ),
        (
            "run_dir: x\nprovoke: low_lr",
            "bad.yaml: provoke: 'low_lr' must be one of none, high_lr, scale_qk",
        ),
        (
            "run_dir: x\nscale_qk: {layers: [a]}",
            "bad.yaml: scale_qk.layers[0]: 'a' must be a whole number of at least 0",
        ),
        ("run_dir: x\ntraining: 3", "bad.yaml: training: 3 must be keys and values"),
        ("seed: 1", "bad.yaml: run_dir: missing, must be text"),
        ("- a", "bad.yaml: holds a list, must map keys to values"),
        ("run_dir: [", "bad.yaml: not valid YAML"),
    ],
)
def test_an_error_in_the_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_settings(Settings, path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.steps=1.5",
            "command line: training.steps: 1.5 must be a whole number of at least 1",
        ),
        ("training.stepz=1", "command line: training.stepz: unknown key, did you mean 'steps'?"),
        ("seed.x=1", "command line: seed: {'x': 1} must be a whole number"),
        ("seed", "command line: 'seed' is not key=value"),
        ("seed=[", "command line: seed: '[' is not a YAML value"),
    ],
)
def test_an_error_on_the_command_line_names_the_key(override: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(Settings, ROOT / "configs" / "train_plain_loop.yaml", [override])
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"none\.yaml: No such file or directory; name a YAML file"
    ):
        read_settings(Settings, tmp_path / "none.yaml")
