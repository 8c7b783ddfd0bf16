"""Check the layers of stabmon: imports point down, and a core names no leaf."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import stabmon
from stabmon.interventions import INTERVENTIONS
from stabmon.records import Reading
from stabmon.rules import RULES

PACKAGE = Path(__file__).parents[1] / "stabmon"
FILES = sorted(PACKAGE.rglob("*.py"))
Sources = Mapping[Path, str]
"""The text of each file, by its path below the package."""

ANYWHERE = ("_moved",)
"""Old import paths, which go with the next release."""
_GROUND = ("_display", "_settings", "_storage", "_torch", "model_names", "records", "registry")
ALLOWED: dict[str, Collection[str]] = {
    "__init__": (),
    "_display": (),
    "_moved": (),
    "_settings": (),
    "_storage": (),
    "_torch": (),
    "figures": (),
    "model_names": (),
    "records": ("_display", "_storage"),
    "registry": (),
    "tiny": ("_settings",),
    "listeners": ("_torch", "records"),
    "operator": ("_torch", "records"),
    "capture": ("_torch", "model_names", "records"),
    "signals": ("_torch", "operator", "records", "registry"),
    "diagnosis": ("_display", "figures", "incidents", "records", "signals"),
    "rules": ("_settings", "_storage", "_torch", "records", "registry"),
    "risk": ("records", "rules"),
    "projections": ("_storage", "_torch", "model_names", "records"),
    "nonfinite": (*_GROUND, "capture", "listeners", "operator", "signals"),
    "incidents": ("_display", "_storage", "records", "rules"),
    "sinks": (
        *("_display", "_settings", "_storage", "figures", "incidents", "records", "registry"),
        "signals",
    ),
    "interventions": (
        *(*_GROUND, "capture", "incidents", "operator", "projections", "rules", "signals"),
    ),
    "guard": (*_GROUND, "incidents", "interventions", "listeners", "projections", "rules"),
    "config": ("_settings", "guard", "interventions", "operator", "rules", "signals", "sinks"),
    "analysis": (*_GROUND, "capture", "figures", "operator", "signals"),
    "controllers": (*_GROUND, "capture", "figures", "operator", "rules", "signals", "sinks"),
    "engine": (
        *_GROUND,
        *("capture", "config", "diagnosis", "guard", "incidents", "interventions", "listeners"),
        "nonfinite",
        *("operator", "projections", "report", "risk", "rules", "signals", "sinks"),
    ),
    "check": (
        *_GROUND,
        *("capture", "figures", "nonfinite", "operator", "projections", "signals", "tiny"),
    ),
    "report": (
        *("__init__", "_storage", "_torch", "analysis", "figures", "incidents", "records", "rules"),
        *("signals", "sinks"),
    ),
    "integrations": (
        *("_display", "_settings", "_storage", "_torch", "config", "engine", "records", "sinks"),
    ),
    "study": ("_settings", "config", "controllers", "engine", "tiny"),
    "cli": (
        *_GROUND,
        *("analysis", "check", "config", "controllers", "figures", "incidents", "interventions"),
        *("__init__", "report"),
        *("operator", "rules", "signals", "sinks", "study", "tiny"),
    ),
}
"""Package or module at the root -> what it may import besides itself. Every one is named."""
FRAMEWORKS = {"transformers", "lightning", "pytorch_lightning", "accelerate"}
LOGGERS = {"wandb", "mlflow", "tensorboard", "matplotlib"}
MAY_IMPORT_FRAMEWORKS = (
    "analysis/kv_cache/cache/stock_cache.py",
    "capture/",
    "check/loading/pretrained.py",
    "integrations/",
    "tiny/language_models.py",
)
CORE = (
    "config/",
    "engine/",
    "guard/",
    "interventions/base/",
    "interventions/run/",
    "rules/tracking/",
)
"""Files that must work with any rule and intervention, and so name none."""
LEAVES = {*INTERVENTIONS, *RULES} - {each.name for each in dataclasses.fields(Reading)}
"""Names of rules and interventions; ``non_finite`` is also a field of a reading."""
MOST_AT_ROOT, MOST_IN_FOLDER = 6, 15
"""Modules at the root of stabmon, and in any other folder beside ``__init__.py``."""


def in_folder(path: Path, places: Collection[str]) -> bool:
    return path.as_posix().startswith(tuple(places))


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = ("stabmon", *path.with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every name imported anywhere in a file, in full, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


parse = functools.cache(ast.parse)


@functools.cache
def imports_of(path: Path, source: str) -> frozenset[str]:
    return frozenset(imported(parse(source), module_of(path.parent / "__init__.py")))


def nearest(name: str, modules: Collection[str]) -> str | None:
    """Return the module that an imported name is of; None where it is not one of ``modules``."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def graph(sources: Sources) -> dict[str, set[str]]:
    """Return the modules that each module imports, of those in ``sources``."""
    modules = {module_of(path) for path in sources}
    return {
        module_of(path): {
            found
            for name in imports_of(path, source)
            if (found := nearest(name, modules)) is not None and found != module_of(path)
        }
        for path, source in sources.items()
    }


def circles(sources: Sources) -> list[str]:
    try:
        TopologicalSorter(graph(sources)).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def between_packages(sources: Sources) -> list[str]:
    """Describe each import that the table does not allow."""
    modules = {module_of(path) for path in sources}
    wrong = []
    for path, source in sources.items():
        part = part_of(path)
        if part not in ALLOWED:
            wrong.append(f"{path}: {part} is not in the table of allowed imports")
            continue
        names = {nearest(name, modules) for name in imports_of(path, source)} - {None}
        parts = {(f"{name}.__init__").split(".")[1] for name in names if name is not None}
        wrong += [
            f"{path} imports {each}"
            for each in sorted(parts - {part, *ANYWHERE} - set(ALLOWED[part]))
        ]
    return wrong


def for_type_checkers_only(sources: Sources) -> list[str]:
    """Describe each import of stabmon that only a type checker sees."""
    return [
        f"{path}:{node.lineno} imports {name} under TYPE_CHECKING"
        for path, source in sources.items()
        if "TYPE_CHECKING" in source
        for node in ast.walk(parse(source))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for name in imported(ast.Module(node.body, []), module_of(path.parent / "__init__.py"))
        if name.partition(".")[0] == "stabmon"
    ]


def at_top(tree: ast.Module) -> Iterator[str]:
    """Top-level packages imported when the module is."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name.split(".")[0] for name in imported(node, "stabmon"))
        waiting += ast.iter_child_nodes(node)


@functools.cache
def loaded_by(source: str) -> frozenset[str]:
    return frozenset(at_top(parse(source)))


def options(sources: Sources) -> list[str]:
    """Describe imports of frameworks and loggers where they are not allowed."""
    wrong = []
    for path, source in sources.items():
        tops = {name.partition(".")[0] for name in imports_of(path, source)}
        loaded = loaded_by(source)
        wrong += [f"{path} imports {each} when it is imported" for each in loaded & LOGGERS]
        if not in_folder(path, MAY_IMPORT_FRAMEWORKS):
            wrong += [f"{path} imports {each}" for each in tops & FRAMEWORKS]
    return wrong


def named_leaves(sources: Sources) -> list[str]:
    """Describe each name of a rule or an intervention in a core file, docstrings apart."""
    wrong = []
    for path, source in sources.items():
        if not in_folder(path, CORE):
            continue
        nodes = list(ast.walk(parse(source)))
        said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        wrong += [
            f"{path}:{node.lineno} names {name}"
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if id(node) not in said
            for name in re.findall(r"\w+", node.value)
            if (name in LEAVES and "_" in name) or (node.value in LEAVES and name == node.value)
        ]
    return wrong


def crowded(paths: Collection[Path]) -> list[str]:
    """Describe folders with more modules than a reader can take in."""
    root = [path for path in paths if path.parent == Path(".")]
    wrong = [f"{len(root)} modules at the root"] if len(root) > MOST_AT_ROOT else []
    for folder in sorted({path.parent for path in paths} - {Path(".")}):
        own = [path for path in paths if path.parent == folder and path.name != "__init__.py"]
        if len(own) > MOST_IN_FOLDER:
            wrong.append(f"{len(own)} modules in {folder}")
    return wrong


CHECKS = (circles, between_packages, for_type_checkers_only, options, named_leaves, crowded)


@pytest.fixture(scope="module")
def sources() -> Sources:
    return {path.relative_to(PACKAGE): path.read_text() for path in FILES}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_stabmon_keeps_to_its_layers(check, sources: Sources) -> None:
    assert check(sources) == []


def test_the_table_itself_points_one_way() -> None:
    assert {name for names in ALLOWED.values() for name in names} <= set(ALLOWED)
    TopologicalSorter(ALLOWED).prepare()


PLANTED = [
    (circles, "records.py", "def f():\n    from stabmon.engine.monitor import nothing"),
    (circles, "_torch/tensors.py", "from stabmon._torch import outputs\nimport stabmon._torch"),
    (circles, "rules/base.py", "from .tracking.issue_tracker import IssueTracker"),
    (between_packages, "operator/fused.py", "from stabmon.signals import SIGNALS"),
    (between_packages, "signals/entropy.py", "def f():\n    import stabmon.rules"),
    (between_packages, "signals/entropy.py", "from stabmon import rules"),
    (between_packages, "capture/names.py", "from ..engine import monitor"),
    (between_packages, "check/api.py", "from stabmon.engine.monitor import Monitor"),
    (between_packages, "engine/monitor.py", "from stabmon import AttentionAnalyzer"),
    (between_packages, "engine/monitor.py", "import stabmon.check.api as api"),
    (between_packages, "loose.py", ""),
    (
        for_type_checkers_only,
        "guard/guard.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from stabmon.records import Reading",
    ),
    (
        for_type_checkers_only,
        "guard/guard.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .policy import Policy",
    ),
    (options, "rules/loss_spike.py", "import lightning"),
    (options, "check/loading/source.py", "def f():\n    import transformers"),
    (options, "sinks/wandb.py", "import wandb"),
    (options, "engine/monitor.py", "try:\n    import mlflow\nexcept ImportError:\n    pass"),
    (options, "figures/lines.py", "class C:\n    from matplotlib.figure import Figure"),
    (named_leaves, "guard/policy.py", "name = 'qk_clip'"),
    (named_leaves, "guard/policy.py", "if name == 'stop':\n    pass"),
    (named_leaves, "engine/monitor.py", "text = f'after a rollback: {1} loss_spike'"),
    (named_leaves, "rules/tracking/history.py", "TABLE = {'entropy_collapse': 1}"),
    (named_leaves, "interventions/run/budget.py", "f(most={'rollback'})"),
]


@pytest.mark.parametrize(("check", "where", "planted"), PLANTED)
def test_a_planted_violation_is_caught(check, where: str, planted: str, sources: Sources) -> None:
    path = Path(where)
    source = f"{sources.get(path, '')}\n{planted}\n"
    found = check(sources | {path: source})
    assert found
    assert module_of(path) in found[0] if check is circles else str(path) in found[0]


@pytest.mark.parametrize(("folder", "more"), [(".", 1), ("guard", 20), ("brand/new", 16)])
def test_a_crowded_folder_is_caught(folder: str, more: int, sources: Sources) -> None:
    added = [Path(folder) / f"more_{number}.py" for number in range(more)]
    room = MOST_AT_ROOT - sum(path.parent == Path(".") for path in sources)
    added += [Path(f"more_{number + more}.py") for number in range(room if folder == "." else 0)]
    assert crowded([*sources, *added])


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("guard/policy.py", '"""As qk_clip does."""'),
        ("guard/policy.py", 'X = 1\n"""After a rollback."""'),
        ("interventions/qk_clip.py", "name = 'rollback'"),
    ],
)
def test_a_leaf_may_be_named_in_docstrings_and_by_leaves(where: str, source: str) -> None:
    assert named_leaves({Path(where): source}) == []


def test_public_names_are_declared_to_type_checkers_as_they_are_loaded() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    declared = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == stabmon._HOMES
    assert set(stabmon.__all__) == set(declared) <= set(dir(stabmon))
    for name in stabmon.__all__:
        assert getattr(stabmon, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = stabmon.nonesuch


def test_importing_stabmon_loads_no_option_and_patches_nothing() -> None:
    code = """
import sys, torch, torch.nn.functional as F
before = dict(vars(F)), dict(vars(torch.nn.Module)), torch.get_rng_state()
import stabmon, stabmon.cli
after = dict(vars(F)), dict(vars(torch.nn.Module)), torch.get_rng_state()
assert before[0] == after[0] and before[1] == after[1] and torch.equal(before[2], after[2])
parts = {name.split(".")[1] for name in sys.modules if name.startswith("stabmon.")}
assert parts <= {"_moved", "cli", "registry"}, parts
stabmon.AttentionStabilityMonitor(torch.nn.Linear(1, 1), sinks=[]).close()
assert "stabmon.check" not in sys.modules and "stabmon.analysis" not in sys.modules
options = {"transformers", "lightning", "wandb", "mlflow", "tensorboard", "matplotlib", "plotly", "PIL"}
assert not options & set(sys.modules), options & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_stabmon_alone_does_not_even_load_torch() -> None:
    code = "import sys, stabmon; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
