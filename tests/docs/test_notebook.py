"""The notebook of the first hour; ``python -m tests.docs.test_notebook`` stores its outputs anew."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
MOST_BYTES = 300_000
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "PYTHONPATH": str(NOTEBOOK.parents[1]),
}


def executed(folder: str) -> Any:
    """Return the notebook with the outputs of a run in ``folder``."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=240, coalesce_streams=True, resources={"metadata": {"path": folder}}
    )
    return client.execute(env=os.environ | ENVIRONMENT)


def texts(cell: Any) -> str:
    """Return what a cell printed and showed as text."""
    return "".join(
        each.text if each.output_type == "stream" else each.data.get("text/plain", "")
        for each in cell.outputs
    )


def cells(notebook: Any) -> list[Any]:
    return [each for each in notebook.cells if each.cell_type == "code"]


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.long
def test_it_runs_from_top_to_bottom_and_says_what_is_stored(stored: Any, tmp_path: Path) -> None:
    found = executed(str(tmp_path))
    assert (tmp_path / "report.html").stat().st_size > 10_000
    for new, old in zip(cells(found), cells(stored), strict=True):
        kinds = [[each.output_type for each in cell.outputs] for cell in (new, old)]
        assert kinds[0] == kinds[1], new.source
    said = [texts(cell) for cell in cells(found)]
    assert "W_q and W_k grow" in "".join(said)
    losses = re.findall(r"(\w+) +loss ([\d.]+)", said[-2])
    healthy, broken, guarded = (float(loss) for _, loss in losses)
    assert guarded < broken
    assert guarded == pytest.approx(healthy, abs=0.1)


def test_it_is_small_and_names_nothing_of_the_machine(stored: Any) -> None:
    written = NOTEBOOK.read_text(encoding="utf-8")
    assert len(written.encode()) < MOST_BYTES
    assert not re.search(r"/(?:tmp|home|root|work)/", written)
    assert all(cell.outputs for cell in cells(stored)[1:])


def main() -> None:
    """Run the notebook and store it with its outputs."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(folder)
    for cell in cells(notebook):
        cell.metadata.pop("execution", None)  # times, which differ from run to run
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
