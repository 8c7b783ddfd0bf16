"""Progress of long work on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def working(doing: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done while it is done, on a terminal only.

    Args:
        doing: the work in words.

    Yields:
        A function that changes the words.
    """
    if not sys.stderr.isatty():  # rich would also take FORCE_COLOR for a terminal
        yield lambda doing: None
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{doing} …") as status:
        yield lambda doing: status.update(f"{doing} …")


def duration(seconds: float) -> str:
    """Write a duration roughly.

    >>> duration(42), duration(400), duration(9000)
    ('40 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
