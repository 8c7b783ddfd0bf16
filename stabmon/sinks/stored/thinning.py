"""Thin the readings of a long run by age: the older, the further apart."""

from __future__ import annotations

import re
from pathlib import Path

from stabmon._storage import strict_json
from stabmon._storage.atomic_write import replace_whole

MOST_BYTES = 2**30
"""Size of ``readings.jsonl`` above which older readings are thinned: 1 GiB."""
_STEP = re.compile(rb'\{"schema_version": \d+, "step": (\d+), ')
_MARKS = re.compile(rb', "run": (\d+), "start": (\d+)[,}]')


def thin(readings: Path, issues: Path) -> int:
    """Remove every second line of the older half of a file of readings.

    A step with an issue, the first line of a start, one with facts about layers and one that
    stabmon did not write stay. The new file takes the place of the old one whole.

    Args:
        readings: ``readings.jsonl``, which nobody writes to meanwhile.
        issues: ``issues.jsonl``.

    Returns:
        The number of lines removed.

    Raises:
        OSError: if it cannot be written; the file is as it was then.
    """
    kept_steps = _steps_of(issues)
    half = readings.stat().st_size // 2
    removed = 0

    def write(fresh: Path) -> None:
        nonlocal removed
        removed, position, last, is_second = 0, 0, (b"", b""), False
        with readings.open("rb") as old, fresh.open("wb") as new:
            for line in old:
                position += len(line)
                step, marks = _STEP.match(line), _marks(line)
                is_due = (
                    position <= half
                    and step is not None
                    and marks == last
                    and marks is not None
                    and b'"info": {' not in line
                    and (int(marks[0]), int(step[1])) not in kept_steps
                )
                last = marks or last
                if is_due:
                    is_second = not is_second
                if is_due and is_second:
                    removed += 1
                else:
                    new.write(line)

    replace_whole(readings, write)
    return removed


def _marks(line: bytes) -> tuple[bytes, bytes] | None:
    """Return run and start of a line; None where they are not where stabmon writes them."""
    found = _MARKS.search(line, max(0, line.rfind(b', "run": ')))
    return None if found is None else (found[1], found[2])


def _steps_of(issues: Path) -> set[tuple[int, int]]:
    """Return run and step of every issue that can be read."""
    found = set()
    with issues.open("rb") as file:
        for line in file:
            try:
                values = strict_json.loads(line)
                found.add((int(values.get("run", 1)), int(values["step"])))
            except (ValueError, KeyError, TypeError):
                continue
    return found
