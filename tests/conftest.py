"""What holds for the whole session of tests."""

import sys
from collections.abc import Iterator

import pytest

from tests.support.loaded_modules import loaded_twice

collect_ignore = ["support/third_party"]
"""A package of its own, which tests install."""


@pytest.fixture(scope="session", autouse=True)
def every_file_is_loaded_once() -> Iterator[None]:
    """Fail the session at its end if a file of this repository was loaded under two names."""
    yield
    assert loaded_twice(sys.modules) == {}
