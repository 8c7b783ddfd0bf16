"""Whole lines at any position of a file that may be growing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_BLOCK = 1 << 16


class LineFile:
    """An open file of lines, up to the last newline it had when it was opened.

    The file is read, not mapped: one that is truncated meanwhile ends early, and does not end the
    process.

    Args:
        path: the file.

    Attributes:
        stat: size, time and identity of the file as it was opened.
        end: position after its last newline.

    Raises:
        OSError: if it cannot be opened or read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "lines"
        >>> _ = path.write_bytes(b"one\\ntwo\\nthr")
        >>> with LineFile(path) as file:
        ...     file.after(1), file.before(file.end), file.after(5)
        ((4, b'two\\n'), (4, b'two\\n'), None)
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=_BLOCK)
        try:
            self.stat = os.fstat(self._file.fileno())
            self.end = self._line_start(self.stat.st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to before ``end``."""
        self._file.seek(start)
        return self._file.read(end - start)

    def after(self, position: int, most: int = -1) -> tuple[int, bytes] | None:
        """Return position and bytes of the first line that begins at or after a position.

        Args:
            position: in bytes.
            most: largest number of bytes to return of the line; -1 for all of it.

        Returns:
            None where no whole line begins there.
        """
        self._file.seek(max(0, position - 1))
        if position > 0:
            self._file.readline()
        at = self._file.tell()
        if at >= self.end:
            return None
        return at, self._file.readline(most)

    def before(self, end: int) -> tuple[int, bytes] | None:
        """Return position and bytes of the line whose newline is the last byte before ``end``."""
        if end <= 0:
            return None
        start = self._line_start(end - 1)
        return start, self.read(start, end)

    def first(self, holds: Callable[[bytes], bool | None]) -> int:
        """Return the position of the first line that holds, by bisection.

        Args:
            holds: False for every line before it, True from it on, and None for a line of
                which it is unknown.

        Returns:
            Its position; :attr:`end` where no line holds.
        """
        low, high, best = 0, self.end, self.end
        while low < high:
            middle = (low + high) // 2
            found, verdict = self.after(middle), None
            while found is not None and found[0] < best and (verdict := holds(found[1])) is None:
                found = self.after(found[0] + 1)
            if found is not None and found[0] < best and verdict is False:
                low = found[0] + 1
            else:
                best = best if found is None else min(best, found[0])
                high = middle
        return best

    def _line_start(self, end: int) -> int:
        """Return the position after the last newline before ``end``; 0 where there is none."""
        while end > 0:
            start = max(0, end - _BLOCK)
            at = self.read(start, end).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
        return 0
