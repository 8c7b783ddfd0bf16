"""Settings of a monitor: presets, files and arguments, and errors with their file and key."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from stabmon._settings.docs import setting_docs
from stabmon.config import StabilityConfig, load_config, presets
from stabmon.config.write_presets import preset_in_full
from stabmon.guard import Budget
from stabmon.operator import ENGINES
from stabmon.signals import SIGNALS
from stabmon.sinks import SINKS

CONFIGS = Path(__file__).parents[2] / "configs"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", presets())
def test_a_file_for_reading_is_its_preset_in_full(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text() == preset_in_full(name), (
        "run `python -m stabmon.config.write_presets configs`"
    )
    assert yaml.safe_load(path.read_text()).keys() == load_config(name).to_dict().keys()
    config = load_config(path)
    assert config.make_budget() == load_config(name).make_budget()
    assert load_config(config, budget={}).to_dict() == load_config(name, budget={}).to_dict()


@pytest.mark.parametrize("cls", [StabilityConfig, Budget])
def test_every_setting_is_explained(cls: type) -> None:
    assert all(setting_docs(cls).values())


def test_the_first_preset_has_the_defaults() -> None:
    assert presets() == ["guard", "observe"]
    assert load_config("observe") == load_config(None) == StabilityConfig()


@pytest.mark.long
@pytest.mark.parametrize(("name", "files"), [("guard", 2), ("observe", 1)])
def test_a_preset_reads_only_the_files_that_it_names(name: str, files: int) -> None:
    code = f"""
import sys
import torch, stabmon
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with stabmon.AttentionStabilityMonitor(model, optimizer=optimizer, config={name!r}, sinks=[]) as m:
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        m.on_step(loss=1.0)
    m.load_state_dict(m.state_dict())
print(sum(path.endswith(".yaml") for path in opened))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (str(files), 0), done.stderr


def test_keyword_arguments_override_a_preset_a_file_and_a_config(tmp_path: Path) -> None:
    path = written(tmp_path, "log_every: 7\nsinks: [console]\n")
    for config in ("observe", None, path, str(path), StabilityConfig(log_every=3)):
        assert load_config(config, log_every=9).log_every == 9
    assert load_config(path).log_every == 7
    assert load_config(path).sinks == ["console"]
    assert load_config(path, log_every=None).log_every == 7


def test_a_keyword_argument_replaces_a_mapping_whole() -> None:
    assert list(load_config("guard", interventions={"stop": {}}).interventions) == ["stop"]
    limits = load_config(StabilityConfig(budget={"patience": 9}), budget={"max_rollbacks": 1})
    assert limits.make_budget() == Budget(max_rollbacks=1)


def test_a_file_adds_to_the_preset_that_it_extends_key_by_key(tmp_path: Path) -> None:
    text = """
extends: guard
interventions: {rollback: false, qk_clip: {target: 50}, lower_learning_rate: {factor: 0.5}}
budget: {patience: 9}
rules: {loss_spike: false}
"""
    config, guard = load_config(written(tmp_path, text)), load_config("guard")
    made = config.make_interventions()
    present = guard.make_interventions().keys() - {"rollback"}
    assert made.keys() == present | {"lower_learning_rate"}
    assert made["qk_clip"].settings["target"] == 50
    assert made["lower_learning_rate"].settings == {"factor": 0.5, "where": "all"}
    assert config.make_budget() == dataclasses.replace(guard.make_budget(), patience=9)
    assert len(config.make_rules()) == len(guard.make_rules()) - 1


def test_a_file_can_set_levels_and_leave_rules_out(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, "rules:\n  loss_spike: false\n  precision_insufficient: {growth: 123}\n")
    )
    rules: dict[str, Any] = {type(rule).__name__: rule for rule in config.make_rules()}
    assert "LossSpike" not in rules
    assert rules["PrecisionInsufficient"].growth == 123


def test_old_names_work_beside_a_preset_and_warn_once_with_file_and_new_name(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path,
        "extends: guard\nbudget: {acts: 3, hold: 5}\nrules: {loss_spike: {least_past: 30}}\n",
    )
    with pytest.warns(FutureWarning) as told:
        config = load_config(path)
    texts = sorted(str(each.message) for each in told)
    assert texts == [
        f"stabmon: {path}: {each}, the old name works for one more release"
        for each in (
            "budget: acts is now max_interventions",
            "budget: hold is now release_after",
            "rules.loss_spike: least_past is now min_history",
        )
    ]
    assert {each.filename for each in told} == {__file__}
    assert config.make_budget() == Budget(max_interventions=3, release_after=5)
    (rule,) = (each for each in config.make_rules() if type(each).__name__ == "LossSpike")
    assert rule.min_history == 30  # type: ignore[attr-defined]
    assert config.to_dict()["rules"] == {"loss_spike": {"min_history": 30}}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("log_evry: 5", ["log_evry: unknown key, did you mean 'log_every'? Known: log_every, "]),
        ("log_every: 0", ["log_every: 0 must be a whole number of at least 1"]),
        ("log_every: '5'", ["log_every: '5' must be a whole number"]),
        ("log_every: 1.5", ["log_every: 1.5 must be a whole number"]),
        ("history: 1", ["history: 1 must be a whole number of at least 2"]),
        ("cooldown: -1", ["cooldown: -1 must be a whole number of at least 0"]),
        ("sample_rows: true", ["sample_rows: True must be a whole number", "or null"]),
        ("watch_every_step: 'no'", ["watch_every_step: 'no' must be true or false"]),
        (
            "signals: [max_logits]",
            ["signals[0]: unknown signal 'max_logits', did you mean 'max_logit'? Known: "],
        ),
        ("signals: []", ["signals: [] must be", "at least one"]),
        ("signals: max_logit", ["signals: 'max_logit' must be a list"]),
        (
            "sinks: [jsonl, tensorbord]",
            ["sinks[1]: unknown sink 'tensorbord', did you mean 'tensorboard'"],
        ),
        ("sinks: [3]", ["sinks[0]: 3 must be the name of a known sink"]),
        (
            "engine: fussed",
            ["engine: unknown engine 'fussed', did you mean 'fused'? Known: auto, ", "blockwise"],
        ),
        (
            "rules: {entropy_colapse: {}}",
            ["rules.entropy_colapse: unknown rule", "did you mean 'entropy_collapse'"],
        ),
        (
            "rules: {loss_spike: {deviation: 3}}",
            ["rules.loss_spike.deviation: unknown key, did you mean 'deviations'? Known: "],
        ),
        (
            "rules: {loss_spike: {deviations: many}}",
            ["rules.loss_spike.deviations: 'many' must be a number above 0"],
        ),
        (
            "rules: {entropy_collapse: {kept: 2}}",
            ["rules.entropy_collapse.kept: 2 must be a number of at least 0 and at most 1"],
        ),
        ("rules: {loss_spike: 3}", ["rules.loss_spike: 3 must map"]),
        ("rules: [loss_spike]", ["rules: ['loss_spike'] must be a mapping of rules"]),
        (
            "interventions: {qk_clip: {target: 0}}",
            ["interventions.qk_clip.target: 0 must be a number above 0"],
        ),
        (
            "interventions: {lower_learning_rate: {where: values}}",
            ["lower_learning_rate.where: 'values' must be one of all, query_key"],
        ),
        (
            "budget: {patience: 0}",
            ["budget.patience: 0 must be a whole number of at least 1"],
        ),
        (
            "budget: {max_rolbacks: 1}",
            ["budget.max_rolbacks: unknown key, did you mean 'max_rollbacks'"],
        ),
        ("budget: 3", ["budget: 3 must be keys and values"]),
        ("- log_every", ["holds a list, must map keys to values"]),
        ("a: [", ["not valid YAML"]),
        ("attention_modules: [3]", ["attention_modules[0]: 3 must be text"]),
        ("extends: gaurd", ["extends: 'gaurd' must be a preset or a path", "mean 'guard'?"]),
        ("extends: 3", ["extends: 3 must be a preset or a path"]),
    ],
)
def test_a_slip_is_one_line_with_the_file_the_key_and_the_remedy(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_wrong_argument_is_called_an_argument_and_not_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "budget: {patience: 3}")
    with pytest.raises(ValueError, match=r"^argument: budget\.patience: 0 must be"):
        load_config(path, budget={"patience": 0})
    with pytest.raises(ValueError, match=r"^argument: log_evry: unknown key"):
        load_config(StabilityConfig(), log_evry=3)


def test_a_config_made_by_hand_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^log_every: 0 must be"):
        StabilityConfig(log_every=0)
    with pytest.raises(ValueError, match=r"^rules\.loss_spike\.near: 0 must be"):
        StabilityConfig(rules={"loss_spike": {"near": 0}})


def test_a_config_that_is_nowhere_names_the_presets() -> None:
    with pytest.raises(ValueError, match=r"neither a preset \(guard, observe\).*mean 'observe'"):
        load_config("obsrve")
    with pytest.raises(ValueError, match=r"gone\.yaml: No such file"):
        load_config("gone.yaml")


def test_settings_of_a_sink_of_ones_own_are_left_as_they_are() -> None:
    own = SINKS["console"]()
    assert load_config("observe", sinks=["jsonl", own]).sinks[1] is own


def names(known: Sequence[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(known), min_size=1, max_size=4)


@examples(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "log_every": st.integers(1, 10**6),
            "signals": names([*SIGNALS]),
            "sinks": names([*SINKS]),
            "engine": st.sampled_from(["auto", *ENGINES]),
            "sample_rows": st.none() | st.integers(1, 10**6),
            "attention_modules": st.lists(st.text(max_size=5), max_size=3),
            "watch_every_step": st.booleans(),
            "rules": st.fixed_dictionaries(
                {},
                optional={
                    "loss_spike": st.booleans() | st.none(),
                    "entropy_collapse": st.fixed_dictionaries({"kept": st.floats(0, 1)}),
                    "logit_growth": st.fixed_dictionaries(
                        {"damage_level": st.floats(0, exclude_min=True, allow_infinity=True)}
                    ),
                },
            ),
            "interventions": st.fixed_dictionaries(
                {},
                optional={
                    "stop": st.booleans(),
                    "qk_clip": st.fixed_dictionaries(
                        {}, optional={"target": st.none() | st.floats(1e-30, 1e30)}
                    ),
                },
            ),
            "budget": st.fixed_dictionaries(
                {}, optional={"patience": st.integers(1, 99), "min_lr_scale": st.floats(1e-6, 1)}
            ),
        },
    )
)
def test_settings_written_down_are_read_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    config = load_config("guard", **values)
    path = tmp_path_factory.mktemp("round") / "again.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(path).to_dict() == config.to_dict()
    assert load_config(StabilityConfig(**config.to_dict())).to_dict() == config.to_dict()


def test_per_head_reaches_the_sinks_that_are_given_by_name_and_know_it() -> None:
    config = load_config("observe", per_head=True, sinks=["jsonl", "tensorboard"])
    plain, board = config.make_sinks()
    assert type(plain).__name__ == "JsonlSink"
    assert board._per_head is True  # type: ignore[attr-defined]
    (board,) = load_config("observe", sinks=["tensorboard"]).make_sinks()
    assert board._per_head is False  # type: ignore[attr-defined]
