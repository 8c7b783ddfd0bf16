"""Types, limits and layers of settings, and names that have changed."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabmon._settings import (
    NOT_A_SETTING,
    Bounds,
    Count,
    Fraction,
    Known,
    Layer,
    NonEmpty,
    SettingsError,
    check,
    read,
    read_settings,
    renamed,
    setting_names,
    word_layers,
    yaml_layers,
)
from stabmon._settings.limits import Limit


@renamed(rate="learning_rate")
@dataclass(frozen=True)
class Phase:
    steps: Count = 400
    learning_rate: Annotated[float, Bounds(above=0)] = 1e-3


@dataclass(frozen=True)
class Settings:
    run_dir: str
    count: Count = 1
    share: Fraction = 0.5
    flag: bool = False
    mode: Literal["fast", "exact", 3] = "fast"
    limit: Annotated[int, Bounds(0)] | None = None
    layers: list[Annotated[int, Bounds(0)]] | None = None
    names: Annotated[Sequence[Annotated[str, Known(("one", "three"), "number")]], NonEmpty()] = (
        "one",
    )
    betas: tuple[float, float] = (0.9, 0.95)
    either: str | float = "text"
    weights: Mapping[str, float] = field(default_factory=dict)
    phase: Phase = field(default_factory=lambda: Phase(learning_rate=1e-2))
    maybe: Phase | None = None
    note: str = field(default="", metadata=NOT_A_SETTING)


def of(values: Any, *more: Any) -> Settings:
    layers = [Layer(each, f"{at}.yaml") for at, each in enumerate((values, *more))]
    return read(Settings, Layer({"run_dir": "x"}, "base.yaml"), *layers)


@pytest.mark.parametrize(
    ("values", "name", "wanted"),
    [
        ({"share": 1}, "share", 1.0),
        ({"share": "1e-3"}, "share", 1e-3),
        ({"count": np.int64(3)}, "count", 3),
        ({"share": np.float32(0.5)}, "share", 0.5),
        ({"mode": 3}, "mode", 3),
        ({"limit": None}, "limit", None),
        ({"layers": [0, 2]}, "layers", [0, 2]),
        ({"names": ("one", "three")}, "names", ("one", "three")),
        ({"betas": [0, 1]}, "betas", (0.0, 1.0)),
        ({"either": 3}, "either", 3.0),
        ({"weights": {"a": 1}}, "weights", {"a": 1.0}),
        ({"maybe": {"steps": 3}}, "maybe", Phase(steps=3)),
        ({"maybe": None}, "maybe", None),
        ({"phase": Phase(steps=7)}, "phase", Phase(steps=7)),
    ],
)
def test_a_value_becomes_what_its_annotation_says(
    values: Mapping[str, Any], name: str, wanted: Any
) -> None:
    found = getattr(of(values), name)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, "0.yaml: count: True must be a whole number of at least 1"),
        ({"count": 1.0}, "0.yaml: count: 1.0 must be a whole number of at least 1"),
        ({"share": "half"}, "0.yaml: share: 'half' must be a number of at least 0 and at most 1"),
        ({"share": "0.5"}, "0.yaml: share: '0.5' must be a number"),
        ({"share": float("nan")}, "0.yaml: share: nan must be a number of at least 0"),
        ({"share": True}, "0.yaml: share: True must be a number"),
        ({"flag": 1}, "0.yaml: flag: 1 must be true or false"),
        ({"run_dir": 3}, "0.yaml: run_dir: 3 must be text"),
        ({"mode": "slow"}, "0.yaml: mode: 'slow' must be one of fast, exact, 3"),
        ({"mode": 3.0}, "0.yaml: mode: 3.0 must be one of"),
        ({"limit": -1}, "0.yaml: limit: -1 must be a whole number of at least 0 or null"),
        ({"layers": [0, "a"]}, "0.yaml: layers[1]: 'a' must be a whole number of at least 0"),
        ({"layers": 3}, "0.yaml: layers: 3 must be a list, each a whole number of at least 0 or"),
        ({"names": "one"}, "0.yaml: names: 'one' must be a list"),
        ({"names": []}, "0.yaml: names: [] must be a list, each the name of a known number, at"),
        ({"names": ["thre"]}, "0.yaml: names[0]: unknown number 'thre', did you mean 'three'?"),
        ({"betas": [1]}, "0.yaml: betas: [1] must be a list of 2, a number, a number"),
        ({"either": None}, "0.yaml: either: None must be text or a number"),
        ({"weights": {"a": "b"}}, "0.yaml: weights.a: 'b' must be a number"),
        ({"weights": [1]}, "0.yaml: weights: [1] must be keys and values"),
        ({"phase": None}, "0.yaml: phase: None must be keys and values"),
        ({"maybe": 3}, "0.yaml: maybe: 3 must be keys and values or null"),
        ({"maybe": {"steps": 0}}, "0.yaml: maybe.steps: 0 must be a whole number of at least 1"),
        (
            {"phase": {"stesp": 1}},
            "0.yaml: phase.stesp: unknown key, did you mean 'steps'? Known: ",
        ),
        ({"note": "x"}, "0.yaml: note: unknown key"),
        ({3: "x"}, "0.yaml: 3: unknown key"),
        ({"names": ["one\n" * 50]}, "0.yaml: names[0]: unknown number"),
        ([1], "0.yaml: [1] must be keys and values"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_source_and_key(values: Any, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        of(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^mine\.yaml: run_dir: missing, must be text$"):
        read(Settings, Layer({}, "mine.yaml"), *word_layers(["count=3"]))


def test_a_condition_of_the_whole_is_named_with_its_source() -> None:
    @dataclass(frozen=True)
    class Shape:
        heads: int = 4
        width: int = 8

        def __post_init__(self) -> None:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} must be a multiple of {self.heads} heads")

    with pytest.raises(SettingsError, match=r"^mine\.yaml: model: width 9 must be a multiple"):
        read(Shape, Layer({"width": 9}, "mine.yaml"), key="model")


def test_later_layers_win_key_by_key_and_a_replacing_one_whole() -> None:
    first, second = {"phase": {"steps": 3}, "layers": [1]}, {"phase": {"learning_rate": 5}}
    assert of(first, second).phase == Phase(3, 5.0)
    assert of(first, second, {"phase": {"steps": 9}}).phase == Phase(9, 5.0)
    assert of(first, {"layers": [2]}).layers == [2]
    assert of({"maybe": {"steps": 3}}, {"maybe": None}, {"maybe": {"learning_rate": 2}}).maybe == (
        Phase(learning_rate=2.0)
    )
    whole = read(
        Settings,
        Layer({"run_dir": "x", **first}, "a"),
        Layer({"phase": {"learning_rate": 5}}, "b", replaces=True),
    )
    assert whole.phase == Phase(learning_rate=5.0)


def test_a_part_given_in_part_keeps_the_rest_of_the_fields_default() -> None:
    assert of({"phase": {"steps": 3}}).phase == Phase(3, 1e-2)


def test_an_error_names_the_layer_that_it_is_in() -> None:
    with pytest.raises(SettingsError, match=r"^1\.yaml: phase\.steps: 0 must be"):
        of({"phase": {"steps": 3}}, {"phase": {"steps": 0}}, {"phase": {"learning_rate": 1}})


def test_options_of_a_command_are_written_as_one_types_them() -> None:
    with pytest.raises(SettingsError, match=r"^--learning-rate: -1 must be a number above 0"):
        read(Phase, Layer({"learning_rate": -1}, "--"))


def test_an_instance_made_by_hand_is_checked_and_converted() -> None:
    made = Settings("x", share=1)
    check(made, "here")
    assert type(made.share) is float
    with pytest.raises(SettingsError, match=r"^here: part\.count: 0 must be"):
        check(replace(made, count=0), "here", "part")
    assert "note" not in setting_names(Settings)


def test_annotations_for_type_checkers_alone_are_no_hindrance() -> None:
    @dataclass(frozen=True)
    class Foreign:
        value: NoSuchName = 3  # type: ignore[name-defined]  # noqa: F821

    assert read(Foreign, Layer({"value": "x"}, "")).value == "x"


def test_an_old_name_warns_once_at_the_callers_line_and_works() -> None:
    with pytest.warns(FutureWarning) as told:
        assert of({"phase": {"rate": 2}}).phase.learning_rate == 2.0
    (one,) = told
    assert str(one.message) == (
        "stabmon: 0.yaml: phase: rate is now learning_rate, the old name works for one more release"
    )
    assert one.filename == __file__
    with pytest.warns(FutureWarning, match="^stabmon: Phase: rate is now learning_rate") as told:
        assert Phase(rate=2.0) == Phase(learning_rate=2.0)  # type: ignore[call-arg]
    assert [each.filename for each in told] == [__file__]


def test_new_names_do_not_warn_and_both_at_once_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of({"phase": {"learning_rate": 2}}).phase == replace(Phase(), learning_rate=2.0)
        assert pickle.loads(pickle.dumps(Phase(3))) == Phase(3)
    with pytest.raises(SettingsError, match=r"0\.yaml: phase: rate is the old name of learning_r"):
        of({"phase": {"rate": 2, "learning_rate": 3}})
    with pytest.raises(TypeError, match="Phase: rate is the old name of learning_rate"):
        Phase(rate=2.0, learning_rate=2.0)  # type: ignore[call-arg]


def test_an_old_name_in_a_later_layer_wins_over_the_new_one() -> None:
    with pytest.warns(FutureWarning):
        assert of({"phase": {"learning_rate": 3}}, {"phase": {"rate": 2}}).phase == Phase(400, 2.0)


@given(st.floats(), st.floats(), st.floats())
def test_bounds_are_what_they_say(value: float, low: float, high: float) -> None:
    assert Bounds(low, high).allows(value) == (low <= value <= high)
    assert Bounds(above=low, below=high).allows(value) == (low < value < high)


def test_a_limit_must_say_what_it_allows() -> None:
    with pytest.raises(TypeError):
        Limit()  # type: ignore[abstract]


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_words_are_laid_over_a_file_however_deep(tmp_path: Path) -> None:
    path = file(tmp_path, "a.yaml", "run_dir: x\nphase: {steps: 3}\nmaybe: null\n")
    words = ["phase.learning_rate=3e-4", "maybe.steps=2", "layers=[1, 2]", "flag=true", "count=7"]
    found = read_settings(Settings, path, words)
    assert (found.phase, found.maybe) == (Phase(3, 3e-4), Phase(steps=2))
    assert (found.layers, found.flag, found.count) == ([1, 2], True, 7)
    assert read_settings(Settings, path, [*words, "count=8"]).count == 8


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("phase.steps=0", "command line: phase.steps: 0 must be a whole number of at least 1"),
        ("phase.stpes=1", "command line: phase.stpes: unknown key, did you mean 'steps'?"),
        ("count.x=1", "command line: count: {'x': 1} must be a whole number of at least 1"),
        ("count", "command line: 'count' is not key=value, such as training.steps=50"),
        ("=3", "command line: '=3' is not key=value"),
        ("phase..steps=3", "command line: 'phase..steps=3' is not key=value"),
        ("count=[", "command line: count: '[' is not a YAML value"),
    ],
)
def test_a_wrong_word_is_named(tmp_path: Path, word: str, message: str) -> None:
    path = file(tmp_path, "a.yaml", "run_dir: x\n")
    with pytest.raises(SettingsError) as error:
        read_settings(Settings, path, [word])
    assert str(error.value).startswith(message)


def test_a_file_extends_another_relative_to_itself(tmp_path: Path) -> None:
    file(tmp_path, "base.yaml", "run_dir: base\ncount: 3\nphase: {steps: 3, learning_rate: 2}\n")
    file(tmp_path / "sub", "mid.yaml", "extends: ../base.yaml\ncount: 4\nshare: 2\n")
    top = file(tmp_path, "top.yaml", "extends: sub/mid.yaml\nshare: 1\nphase: {steps: 9}\n")
    found = read_settings(Settings, top)
    assert (found.run_dir, found.count, found.share) == ("base", 4, 1.0)
    assert found.phase == Phase(9, 2.0)
    with pytest.raises(SettingsError, match=r"^.*mid\.yaml: share: 2 must be"):
        read_settings(Settings, tmp_path / "sub" / "mid.yaml")


@pytest.mark.parametrize("link", ["b.yaml", "./b.yaml", "../{here}/b.yaml"])
def test_files_that_extend_each_other_are_refused(tmp_path: Path, link: str) -> None:
    path = file(tmp_path, "a.yaml", f"extends: {link.format(here=tmp_path.name)}\n")
    file(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(
        SettingsError, match=r"a\.yaml: extends: .*b\.yaml.* goes round in a circle"
    ):
        yaml_layers(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: none.yaml", r"none\.yaml: No such file or directory; name a YAML file"),
        ("extends: observe", r"a\.yaml: extends: 'observe' must be a path that ends in \.yaml$"),
        ("extends: [a.yaml]", r"a\.yaml: extends: \['a\.yaml'\] must be a path"),
        ("- a", r"a\.yaml: holds a list, must map keys to values"),
        ("a: [", r"a\.yaml: not valid YAML, "),
        ("a: \x00", r"a\.yaml: not valid YAML, "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        yaml_layers(file(tmp_path, "a.yaml", text))
    assert "\n" not in str(error.value)


def test_an_empty_file_has_no_settings(tmp_path: Path) -> None:
    assert yaml_layers(file(tmp_path, "a.yaml", "# nothing\n"))[0].value == {}
