"""Check that tests are one package: absolute imports from the root, and no other path."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import tests.support.small_runs
from tests.support.loaded_modules import loaded_twice

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
EXTENDS_THE_PATH = {"bench/on_path.py", "train/conftest.py"}
"""Files that may: scripts in bench/ are run by themselves, and train/ is no package."""


LOCAL = {path.stem for path in FILES} | {path.parent.name for path in FILES} - {"tests"}
"""Names of test modules and folders, which are no top-level modules."""
SCRIPTS = [
    path
    for path in sorted((TESTS / "bench").glob("*.py"))
    if "import on_path" in path.read_text() and path.name != "on_path.py"
]


def violations(path: str, source: str) -> list[str]:
    """Describe relative imports, imports past the package and changes of the path."""
    tree, wrong = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            wrong.append(f"{path}:{node.lineno} imports relatively")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            tops = {
                name.partition(".")[0]
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else names)
                if name is not None
            }
            wrong += [
                f"{path}:{node.lineno} imports {each} past the package"
                for each in tops
                if each not in ("train", "on_path") and not importlib_knows(each)
                if each in LOCAL
            ]
        elif ast.unparse(node) == "sys.path" and path not in EXTENDS_THE_PATH:
            wrong.append(f"{path}:{node.lineno} changes sys.path")
    return wrong


def importlib_knows(name: str) -> bool:
    """Whether a name is of the standard library, an installed package or train/."""
    if (TESTS.parent / "train" / f"{name}.py").exists():
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and str(TESTS) not in str(spec.origin)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_file_imports_from_the_root(path: Path) -> None:
    assert violations(path.relative_to(TESTS).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from .support import small_runs",
        "from support.small_runs import gpt2",
        "def f():\n    from small_runs import gpt2",
        "import testbed.cases",
        "import sys\nsys.path.insert(0, 'x')",
    ],
)
def test_a_planted_violation_is_caught(planted: str) -> None:
    assert violations("engine/test_x.py", planted)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_a_folder_is_a_package(folder: Path) -> None:
    assert (folder / "__init__.py").exists() or folder.name == "third_party"


def test_a_file_loaded_under_a_second_name_is_found() -> None:
    assert loaded_twice(sys.modules) == {}
    once = {"tests.support.small_runs": tests.support.small_runs}
    twice = once | {"small_runs": tests.support.small_runs}
    assert loaded_twice(once) == {}
    assert loaded_twice(twice) == {"tests/support/small_runs.py": sorted(twice)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_bench_puts_the_root_on_the_path_before_it_imports_from_it(script: Path) -> None:
    body = ast.parse(script.read_text()).body
    lines = {ast.unparse(node).splitlines()[-1].strip(): at for at, node in enumerate(body)}
    first = min(
        at
        for line, at in lines.items()
        if line.startswith(("import ", "from ")) and not line.startswith("from __future__")
    )
    assert lines["import on_path"] == first


@pytest.mark.long
def test_the_path_of_a_bench_holds_root_and_train() -> None:
    code = "import on_path, gpt, tests.support.small_runs, stabmon; print(stabmon.__file__)"
    bench = TESTS / "bench"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bench, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == TESTS.parent / "stabmon" / "__init__.py"
