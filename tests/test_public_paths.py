"""Check that public paths, arguments, settings and commands of version 1 still work."""

import ast
import contextlib
import inspect
import io
import json
import pkgutil
import re
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer.main
import yaml

import stabmon
from stabmon.cli import app, main

ROOT = Path(__file__).parent.parent
SURFACE = Path(__file__).parent / "states" / "surface_1.json"
STORED: dict[str, Any] = json.loads(SURFACE.read_text())
"""The public surface of version 1; ``signatures`` holds the arguments that a caller may use."""
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def resolve(path: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old path may be deprecated
        return pkgutil.resolve_name(path)


def parameters_of(signature: str) -> list[inspect.Parameter]:
    """Read a signature that is written down, defaults being literals."""
    names: dict[str, Any] = {}
    exec(f"def function{signature}: pass", names)
    return list(inspect.signature(names["function"]).parameters.values())


@pytest.mark.parametrize("path", STORED["signatures"])
def test_a_public_callable_takes_the_arguments_it_took(path: str) -> None:
    now = list(inspect.signature(resolve(path)).parameters.values())
    then = parameters_of(STORED["signatures"][path])
    by_name = {each.name: each for each in now}
    for each in then:
        assert each.name in by_name
        assert by_name[each.name].kind in (each.kind, each.POSITIONAL_OR_KEYWORD)
        assert by_name[each.name].default == each.default
    positional = [each.name for each in then if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [each.name for each in now][: len(positional)] == positional
    for each in now:
        if each.name not in {old.name for old in then}:
            assert each.default is not each.empty or each.kind.name.startswith("VAR_")


@pytest.mark.parametrize("package", STORED["exports"])
def test_a_package_exports_the_names_it_exported(package: str) -> None:
    for name in STORED["exports"][package]:
        assert resolve(f"{package}:{name}") is not None


def imports_of(page: Path) -> list[str]:
    """List all import statements of a page's Python blocks that name stabmon."""
    found = []
    for block in re.findall(PYTHON, page.read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import | ast.ImportFrom) and "stabmon" in ast.unparse(node):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_imports_that_work(page: Path) -> None:
    for statement in imports_of(page):
        exec(statement, {})
    for path in set(re.findall(r"`(stabmon(?:\.\w+)+)\b(?!\.<)", page.read_text())):
        if not path.endswith((".py", ".yaml")):
            assert resolve(path) is not None


def test_the_pages_have_imports_to_check() -> None:
    assert len(imports_of(PAGES[0])) >= 2
    assert len({each for page in PAGES for each in imports_of(page)}) >= 8


def test_other_names_of_the_pages_are_there() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for path in ("stabmon.sinks.wandb.WandbSink", "stabmon.sinks.records_reader.read_records"):
        assert path.rpartition(".")[2] in text
        assert resolve(path) is not None


def run(*args: str) -> tuple[int, str]:
    """Run the command in this process; give its exit status and standard output."""
    out = io.StringIO()
    with (
        patch("sys.argv", ["stabmon", *args]),
        contextlib.redirect_stdout(out),
        pytest.raises(SystemExit) as left,
    ):
        main()
    return int(left.value.code or 0), out.getvalue()


def test_everything_registered_is_still_listed() -> None:
    status, out = run("list", "--json")
    assert status == 0
    listed = json.loads(out)
    for kind, names in STORED["registries"].items():
        assert set(names) <= set(listed[kind])


def test_every_type_of_issue_has_its_rule() -> None:
    status, out = run("list", "rules", "--json")
    assert status == 0
    assert set(STORED["issue_types"]) <= set(json.loads(out)["rules"])


@pytest.mark.parametrize("command", STORED["commands"])
def test_a_command_takes_the_options_it_took(command: str) -> None:
    commands: Any = typer.main.get_command(app)
    params = commands.get_command(None, command).params
    options = {each for param in params for each in (*param.opts, *param.secondary_opts)}
    assert set(STORED["commands"][command]["options"]) <= options
    arguments = [param.name for param in params if param.param_type_name == "argument"]
    assert len(arguments) >= len(STORED["commands"][command]["arguments"])


def test_the_command_is_installed() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (target,) = re.findall(r'^stabmon = "(stabmon\S*)"$', project, flags=re.MULTILINE)
    assert EntryPoint("stabmon", target, "console_scripts").load() is main


def loaded(config: Any = "observe", **overrides: Any) -> stabmon.StabilityConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an old key may be deprecated
        return stabmon.load_config(config, **overrides)


@pytest.mark.parametrize("field", STORED["config"])
def test_a_field_of_the_configuration_is_accepted_and_keeps_its_default(field: str) -> None:
    value = STORED["config"][field]
    as_field = loaded(stabmon.StabilityConfig(**{field: value}))
    for config in (as_field, loaded("observe", **{field: value})):
        assert holds(config.to_dict(), field, value)
    assert holds(stabmon.StabilityConfig().to_dict(), field, value)


def holds(now: dict[str, Any], field: str, value: Any) -> bool:
    """Return whether a setting has a value; a mapping may name defaults that were implied."""
    if field not in now:
        return True
    if isinstance(value, dict):
        return all(now[field][key] == each for key, each in value.items())
    return bool(now[field] == value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("rules", "interventions") for name in STORED[kind]],
    ids=str,
)
def test_a_setting_of_a_rule_or_an_intervention_is_accepted(kind: str, name: str) -> None:
    given = {key: value for key, value in STORED[kind][name].items() if value is not None}
    assert name in loaded("observe", **{kind: {name: given}}).to_dict()[kind]
    for key, value in given.items():
        loaded("observe", **{kind: {name: {key: value}}})
    with pytest.raises(ValueError, match=name):
        loaded("observe", **{kind: {name: {"no_such_setting": 1}}})


@pytest.mark.parametrize("limit", STORED["budget"])
def test_a_limit_of_the_budget_is_accepted(limit: str) -> None:
    loaded("guard", budget={limit: STORED["budget"][limit]})


@pytest.mark.parametrize("preset", STORED["presets"])
def test_a_copy_of_a_preset_of_version_1_is_accepted(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(STORED["presets"][preset]))
    copied, now = loaded(path).to_dict(), loaded(preset).to_dict()
    # settings of single interventions may have changed since, and a preset may name fewer
    assert now.pop("interventions").keys() <= copied.pop("interventions").keys()
    assert {name: copied[name] for name in copied if name in now} == now
