"""Claim a folder for one writer; a second one takes a folder beside it."""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path

from stabmon._storage.file_lock import try_lock, unlock

logger = logging.getLogger("stabmon")

_MOST = 100
"""Folders beside the first that are tried."""


class FolderClaim:
    """A folder that this process writes to alone, until :meth:`release` or the process's end.

    The lock is advisory, on the folder itself, and leaves no file: a killed process holds none.
    Where the system has no locks on folders, every folder is free.

    Args:
        folder: made if it is missing. Where another writer has it, ``folder-2``, ``folder-3`` … is
            taken, and one line in the log says so.

    Raises:
        OSError: if the folder cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as top:
        ...     first = FolderClaim(Path(top, "run"))
        ...     second = FolderClaim(Path(top, "run"))
        ...     first.release()
        ...     third = FolderClaim(Path(top, "run"))
        ...     first.folder.name, second.folder.name, third.folder.name
        ('run', 'run-2', 'run')
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """The folder that was taken."""
        self._file: int | None = None
        for number in range(1, _MOST + 1):
            self.folder = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock(self.folder):
                break
        if self.folder != folder:
            logger.warning(
                "stabmon: %s belongs to another monitor that is still writing: the records of this "
                "one go to %s; give each run a run_dir of its own",
                folder,
                self.folder,
            )
        # one that is dropped without release(), as in a notebook, lets its folder go as well
        self._end = weakref.finalize(self, _let_go, self._file)

    def release(self) -> None:
        """Let others write to the folder; may be called twice."""
        self._end()

    def _lock(self, folder: Path) -> bool:
        try:
            file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a system that does not open folders
            return True
        if not try_lock(file):
            os.close(file)
            return False
        self._file = file
        return True


def _let_go(file: int | None) -> None:
    if file is not None:
        unlock(file)  # a forked process may have it open still
        os.close(file)
