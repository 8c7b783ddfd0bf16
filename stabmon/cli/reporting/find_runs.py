"""Find the runs that a command is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stabmon.cli.watching.find_run import runs_below
from stabmon.sinks.jsonl import READINGS

MOST_NAMED = 5
"""Runs that are named in a sentence."""


@dataclass(frozen=True)
class Found:
    """A run that was asked for."""

    folder: Path
    """The folder that holds its records, or the output folder above."""
    number: int | None = None
    """Of the runs made in that folder, from 1; None for the newest."""
    note: str = ""
    """Reason of the choice, where the folder itself holds no records."""


def find_run(given: str) -> Found:
    """Return the run that an argument names.

    Args:
        given: an output folder, the ``stabmon`` folder in it, or a folder above runs, whose newest
            run is taken; followed by ``#1`` for the first of several runs in one folder.

    Returns:
        Its folder, with a note where a choice was made.

    Raises:
        ValueError: if there is no such folder, or no run in it or below.
    """
    path, number = Path(given), None
    parts = re.fullmatch(r"(.+)#(\d+)", given)
    if parts is not None and not path.exists():
        path, number = Path(parts[1]), int(parts[2])
    if not path.exists():
        raise ValueError(f"{path}: no such folder; give the output folder of a run")
    if not path.is_dir():
        raise ValueError(f"{path}: is a file; give the output folder of a run")
    if any((folder / READINGS).is_file() for folder in (path / "stabmon", path)):
        return Found(path, number)
    found = sorted(runs_below(path), reverse=True)
    if not found:
        raise ValueError(
            f"{path}: holds no stabmon records; give the run folder that holds stabmon/{READINGS}"
        )
    newest = found[0][1]
    if len(found) == 1:
        return Found(newest, number, f"{path} holds one run, {newest.parent}")
    names = ", ".join(str(folder.parent.relative_to(path)) for _, folder in found[:MOST_NAMED])
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    note = f"{path} holds {len(found)} runs, newest first: {names}{more}. Taken: {newest.parent}"
    return Found(newest, number, note)
