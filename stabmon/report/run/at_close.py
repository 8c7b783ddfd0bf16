"""Write the page of a run as it ends, within a budget of time."""

from __future__ import annotations

from pathlib import Path

from stabmon.report.run.loading import load_runs
from stabmon.report.run.page import PAGE, write_page
from stabmon.sinks.jsonl import READINGS

BYTES_PER_SECOND = 15e6
"""Records that are read and drawn in a second: 22 MB/s were measured for reading alone."""
QUICK, SHARE, LONGEST = 2.0, 0.01, 30.0
"""Seconds that a page may take: 1% of the run's time, at least 2 and at most 30."""


def write_page_at_close(folder: Path, run_seconds: float) -> Path | None:
    """Write the page of the run that has just ended.

    Args:
        folder: the ``stabmon`` folder of its records.
        run_seconds: seconds that the run took.

    Returns:
        The page, ``<folder>/report.html``; None where it would take too long, or where no records
        were written.

    Raises:
        ValueError: if the records cannot be read.
        OSError: if the page cannot be written.
    """
    readings = folder / READINGS
    if not readings.is_file():
        return None
    expected = readings.stat().st_size / BYTES_PER_SECOND
    if expected > min(LONGEST, max(QUICK, SHARE * run_seconds)):
        return None
    return write_page(load_runs([(folder, None)]), folder / PAGE)
