"""The package that ``docs/extend.md`` shows, as another package that is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
POINTS = tomllib.loads((EXAMPLES / "pyproject.toml").read_text())["project"]["entry-points"]
LIST = "import sys; from stabmon.cli import main; sys.argv = ['stabmon', 'list', '--json']; main()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the package into a folder, as pip would, and return an environment that has it."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(EXAMPLES / "my_package", folder / "my_package")
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [
        line
        for group, points in POINTS.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def run(environment: dict[str, str], *arguments: str) -> str:
    """Run Python in an environment and return its standard output."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_leaf_is_listed_with_its_docstring(installed: dict[str, str]) -> None:
    listed = json.loads(run(installed, "-c", LIST))
    for group, points in POINTS.items():
        for name in points:
            assert listed[group.removeprefix("stabmon.")][name]


def test_every_leaf_is_used(installed: dict[str, str], tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("use_examples.py"))
    assert "all leaves work" in run(installed, script, str(tmp_path))


def test_every_kind_has_an_example() -> None:
    page = (ROOT / "docs" / "extend.md").read_text()
    files = sorted(
        path.name for path in (EXAMPLES / "my_package").glob("*.py") if path.stem != "__init__"
    )
    assert len(files) == len(POINTS) == 5
    assert all(f"docs/examples/my_package/{name}" in page for name in files)
