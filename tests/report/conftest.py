"""One browser for all tests of pages, and one run of each kind."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.browser_pages import launch
from tests.support.stored_runs import make_runs


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        launched = launch(started)
        yield launched
        launched.close()


@pytest.fixture(scope="package")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a stored run of each kind, made once for all processes of a session."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(root / "stored.lock"):
        if not (root / "stored").is_dir():
            make_runs(own / "made")
            (own / "made").rename(root / "stored")
    return {folder.name: folder for folder in (root / "stored").iterdir()}
