"""New whole lines of a file that is appended to, truncated or replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from stabmon.sinks.stored.line_file import LineFile

_CONTEXT = 256
"""Bytes before the place reached that are compared, to know the file again."""
_BLOCK = 1 << 22


class FileTail:
    """The place reached in a file of lines.

    A file is known by its last bytes read, not by its inode: a copy kept in step by ``rsync``, or a
    disk that was mounted again, goes on where it was; a file that is shorter or has other bytes
    there begins anew.

    Args:
        path: the file; it need not exist yet.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "lines"
        >>> tail = FileTail(path)
        >>> _ = path.write_bytes(b"one\\ntw")
        >>> with tail.opened() as file:
        ...     list(tail.new_lines(file))
        [(0, b'one\\n')]
        >>> _ = path.write_bytes(b"one\\ntwo\\n")
        >>> with tail.opened() as file:
        ...     list(tail.new_lines(file)), tail.is_new(file)
        ([(4, b'two\\n')], False)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reached = 0
        """Position after the last line read."""
        self._context = b""
        self._seen: tuple[int, ...] = ()

    @contextlib.contextmanager
    def opened(self) -> Iterator[LineFile | None]:
        """Open the file; None where nothing was written to it since, or it does not exist.

        Raises:
            OSError: if it is there and cannot be read.
        """
        try:
            file = LineFile(self.path)
        except FileNotFoundError:
            yield None
            return
        with file:
            seen = (file.stat.st_size, file.stat.st_mtime_ns, file.stat.st_ino)
            yield None if seen == self._seen else file
            self._seen = seen

    def is_new(self, file: LineFile) -> bool:
        """Return whether the file is another one than before, or was truncated."""
        start = self.reached - len(self._context)
        return file.end < self.reached or file.read(start, self.reached) != self._context

    def new_lines(self, file: LineFile) -> Iterator[tuple[int, bytes]]:
        """Yield position and bytes of each whole line not read yet, and move on."""
        rest, at = b"", self.reached
        for start in range(self.reached, file.end, _BLOCK):
            *lines, rest = (rest + file.read(start, min(start + _BLOCK, file.end))).split(b"\n")
            for line in lines:
                yield at, line + b"\n"
                at += len(line) + 1
        self.move_to(file, at)

    def move_to(self, file: LineFile, position: int) -> None:
        """Take a position as the place reached."""
        self.reached = position
        self._context = file.read(max(0, position - _CONTEXT), position)
