"""A sink: issues as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from stabmon.records import StabilityIssue
from stabmon.sinks import Sink


class CsvSink(Sink):
    """Append each issue to ``issues.csv`` in the run's ``stabmon`` folder.

    Args:
        name: the file's name.
    """

    def __init__(self, name: str = "issues.csv") -> None:
        self._name = name
        self._file: TextIO | None = None

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        if run_dir is not None:
            self._file = (run_dir / self._name).open("a", newline="", encoding="utf-8")

    def write_issue(self, issue: StabilityIssue) -> None:
        if self._file is not None:
            row = [issue.step, issue.state, issue.severity, issue.issue_type, issue.where]
            csv.writer(self._file).writerow([*row, issue.value, issue.threshold])
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
