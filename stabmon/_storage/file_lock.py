"""Advisory locks on open files, by which two writers of one folder notice each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows has none: two writers do not notice each other there
    _fcntl = None  # type: ignore[assignment]
fcntl: Any = _fcntl
_LONGEST = 1.0
"""Seconds to wait for a lock that is held for moments only."""


def try_lock(file: int) -> bool:
    """Lock an open file until :func:`unlock`; processes forked meanwhile hold the same lock.

    Args:
        file: its descriptor, open for writing.

    Returns:
        False where another open of the file has the lock; True also where there are no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def unlock(file: int) -> None:
    """Release the lock of an open file, for forked processes as well."""
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked(file: int) -> Iterator[None]:
    """Hold the lock of an open file inside; after a second of waiting go on without it.

    Args:
        file: its descriptor, open for writing.
    """
    end = time.monotonic() + _LONGEST
    while not (mine := try_lock(file)) and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield
    finally:
        if mine:
            unlock(file)
