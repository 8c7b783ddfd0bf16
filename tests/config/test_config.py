"""What a monitor can be told, and that a slip is named with its file and its key."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from stabmon.config import StabilityConfig, load_config, presets

CONFIGS = Path(__file__).parents[2] / "configs"


def written(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_presets_in_the_package_are_the_files_for_reading():
    assert "observe" in presets()
    for name in presets():
        inside = Path(load_config.__code__.co_filename).parent / "presets" / f"{name}.yaml"
        assert inside.read_text() == (CONFIGS / f"{name}.yaml").read_text()


def test_a_preset_says_every_field_and_says_the_defaults():
    values = yaml.safe_load((CONFIGS / "observe.yaml").read_text())
    assert values.keys() <= {field.name for field in dataclasses.fields(StabilityConfig)}
    assert load_config("observe").to_dict() == StabilityConfig().to_dict()


def test_keyword_arguments_override_a_preset_a_file_and_a_config(tmp_path):
    path = written(tmp_path, "log_every: 7\nsinks: [console]\n")
    for config in ("observe", None, path, str(path), StabilityConfig(log_every=3)):
        assert load_config(config, log_every=9).log_every == 9
    assert load_config(path).log_every == 7
    assert load_config(path).sinks == ["console"]
    assert load_config(path, log_every=None).log_every == 7


def test_a_file_can_set_levels_and_leave_rules_out(tmp_path):
    config = load_config(
        written(tmp_path, "rules:\n  loss_spike: false\n  precision_insufficient: {growth: 123}\n")
    )
    rules = {type(rule).__name__: rule for rule in config.make_rules()}
    assert "LossSpike" not in rules
    assert rules["PrecisionInsufficient"].growth == 123


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("log_evry: 5", ["unknown key 'log_evry'", "did you mean 'log_every'"]),
        ("log_every: 0", ["log_every: 0", "at least 1"]),
        ("log_every: '5'", ["log_every: '5'", "whole number"]),
        ("sample_rows: true", ["sample_rows: True", "whole number"]),
        ("watch_every_step: 'no'", ["watch_every_step: 'no'", "true or false"]),
        ("signals: [max_logits]", ["unknown signal 'max_logits'", "did you mean 'max_logit'"]),
        ("signals: []", ["signals", "empty"]),
        ("signals: max_logit", ["signals: 'max_logit'", "list"]),
        ("sinks: [jsonl, tensorbord]", ["unknown sink 'tensorbord'", "did you mean 'tensorboard'"]),
        ("engine: fussed", ["engine", "'fussed'", "blockwise"]),
        (
            "rules: {entropy_colapse: {}}",
            ["unknown rule 'entropy_colapse'", "did you mean 'entropy_collapse'"],
        ),
        (
            "rules: {loss_spike: {deviation: 3}}",
            ["rules.loss_spike", "unknown level 'deviation'", "deviations"],
        ),
        (
            "rules: {loss_spike: {deviations: many}}",
            ["rules.loss_spike.deviations", "'many'", "number"],
        ),
        ("rules: {loss_spike: 3}", ["rules.loss_spike", "3"]),
        ("rules: [loss_spike]", ["rules", "must map"]),
        ("- log_every", ["holds a list", "must map"]),
        ("a: [", ["not valid YAML"]),
        ("attention_modules: [3]", ["attention_modules", "3"]),
    ],
)
def test_a_slip_names_the_file_the_key_and_the_mend_in_one_line(tmp_path, text, parts):
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    message = str(error.value)
    assert str(path) in message
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_config_that_is_nowhere_names_the_presets():
    with pytest.raises(ValueError, match=r"neither a preset .*observe.* nor a YAML file"):
        load_config("obsrve")
    with pytest.raises(ValueError, match=r"gone\.yaml: No such file"):
        load_config("gone.yaml")
    with pytest.raises(ValueError, match="argument: unknown key 'log_evry'"):
        load_config(StabilityConfig(), log_evry=3)


def test_a_config_can_be_written_down_again():
    config = load_config("observe", rules={"loss_spike": False}, log_every=3)
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()
    assert load_config(StabilityConfig(**config.to_dict())).to_dict() == config.to_dict()
