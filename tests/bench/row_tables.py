"""Tables of benches that judge many runs: shares, columns side by side, and a row a run on disk."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import scipy.stats
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def share(hits: int, of: int) -> str:
    """Format a share with its 95% interval (Wilson's)."""
    if not of:
        return "none to judge"
    low, high = scipy.stats.binomtest(hits, of).proportion_ci(method="wilson")
    return f"{hits}/{of} = {hits / of:.2f} ({low:.2f} to {high:.2f})"


def print_side_by_side(columns: Mapping[str, Mapping[str, str]], title: str) -> None:
    """Print a column for each name; all have the same lines."""
    table = Table(title=title, title_justify="left")
    table.add_column("95% intervals in brackets")
    for name in columns:
        table.add_column(name, overflow="fold")
    for line in next(iter(columns.values())):
        table.add_row(line, *(column[line] for column in columns.values()))
    Console(width=max(60 + 34 * len(columns), Console().width)).print(table)


def write_rows(rows: Sequence[DataclassInstance], path: Path) -> None:
    """Write a line of CSV for each row, and print where."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(each) for each in rows)
    print(f"every run: {path}")
