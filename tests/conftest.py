"""What holds for the whole session of tests."""

import gc
import sys
from collections.abc import Generator, Iterator

import pytest

from tests.support.loaded_modules import loaded_twice

collect_ignore = ["support/third_party"]
"""A package of its own, which tests install."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without garbage collection, and leave all that is loaded out of later ones.

    Each Trainer collects garbage when it starts, and stabmon looks through all objects for compiled
    models; both take as long as the modules and tests in memory are many.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def every_file_is_loaded_once() -> Iterator[None]:
    """Fail the session at its end if a file of this repository was loaded under two names."""
    yield
    assert loaded_twice(sys.modules) == {}
