"""One browser for all tests of pages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    """The folder of a stored run of each kind."""
    return make_runs(tmp_path_factory.mktemp("runs"))
