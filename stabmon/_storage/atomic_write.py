"""Files that exist as a whole or not at all, whenever process or machine stop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a fresh file beside ``path`` and put it in its place once it is whole.

    Args:
        path: the file to write; the old one stays until the fresh one is complete.
        write: writes to the path that it is given.

    Raises:
        OSError: if it cannot be written; the old file is whole then, and the fresh one is gone.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Args:
        path: the file to write.
        text: its content.

    Raises:
        OSError: if it cannot be written; the old file is whole then.
    """

    def write(fresh: Path) -> None:
        fresh.write_text(text)

    replace_whole(path, write)
