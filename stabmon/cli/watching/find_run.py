"""Find the records of a run, or say what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stabmon.sinks.jsonl import READINGS

MOST_FOLDERS = 20_000
"""Folders that are looked through for runs."""
_SKIPPED = ("checkpoint-", "__pycache__", "node_modules", "site-packages", "wandb", "mlruns")


def find_run(path: Path) -> Path | None:
    """Return the folder with the records of a run, or of the newest run below.

    Args:
        path: the run's output folder, the ``stabmon`` folder in it, or any folder above runs.

    Returns:
        None where there is none yet.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "one" / "stabmon").mkdir(parents=True)
        >>> _ = (root / "one" / "stabmon" / "readings.jsonl").write_text("")
        >>> find_run(root) == find_run(root / "one") == root / "one" / "stabmon"
        True
    """
    path = path.absolute()
    for folder in (path / "stabmon", path):
        if (folder / READINGS).is_file():
            return folder
    return max(runs_below(path), default=(0.0, None))[1]


def missing(path: Path) -> str:
    """Return what is awaited below a folder without records, in one sentence."""
    if not path.is_dir():
        return f"no stabmon records in {path}: there is no such folder"
    return (
        f"no stabmon records in {path} or below: a watched run writes stabmon/{READINGS} "
        "with its first optimizer step"
    )


def runs_below(path: Path) -> Iterator[tuple[float, Path]]:
    """Yield time of change and folder of each run below."""
    for count, (folder, names, _) in enumerate(os.walk(path)):
        if count >= MOST_FOLDERS:
            return
        names[:] = [name for name in names if not name.startswith((".", *_SKIPPED))]
        if "stabmon" in names:
            records = Path(folder) / "stabmon"
            try:
                yield (records / READINGS).stat().st_mtime, records
            except OSError:
                continue
            names.remove("stabmon")
