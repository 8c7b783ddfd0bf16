"""Mark a part of a sweep as long, so that make test has the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], keep: int) -> list[Any]:
    """Return parameters of which all but the first ``keep`` are left to make test-long.

    Example:
        >>> [bool(each.marks) for each in sweep("abc", keep=1)]
        [False, True, True]
    """
    return [
        pytest.param(value, marks=[pytest.mark.long] if at >= keep else [])
        for at, value in enumerate(values)
    ]
