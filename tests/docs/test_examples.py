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

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
POINTS = tomllib.loads((EXAMPLES / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Install the package into a folder, as pip would, and return what its use prints."""
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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    script = Path(__file__).with_name("use_examples.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_leaf_is_listed_with_its_docstring(printed: list[str]) -> None:
    listed = json.loads(printed[0])
    for group, points in POINTS.items():
        for name in points:
            assert listed[group.removeprefix("stabmon.")][name]


def test_every_leaf_is_used(printed: list[str]) -> None:
    assert printed[-1] == "all leaves work"


def test_every_kind_has_an_example() -> None:
    page = (ROOT / "docs" / "extend.md").read_text()
    files = sorted(
        path.name for path in (EXAMPLES / "my_package").glob("*.py") if path.stem != "__init__"
    )
    assert len(files) == len(POINTS) == 5
    assert all(f"docs/examples/my_package/{name}" in page for name in files)
