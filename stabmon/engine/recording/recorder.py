"""Keep a run's issues, and write readings, issues and interventions to its sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars


class Recorder:
    """The issues of a run in memory, and everything recorded of it in its sinks.

    Args:
        sinks: where to write to; none on ranks that do not write.
        folder: ``<run_dir>/stabmon``, made with the first record or step; None where nothing goes
            to disk.
        boundary: counts what fails.
    """

    def __init__(self, sinks: Sequence[Sink], folder: Path | None, boundary: ErrorBoundary) -> None:
        self.boundary = boundary
        self.issues: list[StabilityIssue] = []
        self.alarms = 0
        """Number of issues of severity error or above."""
        self._sinks = SinkGroup(sinks)
        self._folder = folder
        self._meta: Callable[[], Mapping[str, Any]] | None = None

    def set_meta(self, meta: Callable[[], Mapping[str, Any]]) -> None:
        """Set the function that returns the run's metadata, for ``meta.json``.

        The sinks are opened later, by :meth:`open_sinks`: a run without a step leaves no file.
        """
        self._meta = meta

    @contained
    def open_sinks(self) -> None:
        """Open the sinks at the first record or step; later do nothing."""
        meta, self._meta = self._meta, None
        if meta is not None:
            self._sinks.open(self._make_folder() if self._sinks.sinks else None, meta())
            self._count_failed()

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Add to the run's metadata after the sinks were opened."""
        self._sinks.amend(meta)
        self._count_failed()

    def keep(self, issues: Sequence[StabilityIssue]) -> None:
        """Add to the issues of the run, without writing them."""
        self.issues += issues
        self.alarms += sum(issue.is_alarm for issue in issues)

    def restore(self, issues: Sequence[StabilityIssue]) -> None:
        """Replace the issues of the run by those of a stored state."""
        self.issues, self.alarms = [], 0
        self.keep(issues)

    def write_reading(
        self, reading: Reading, open_issues: Sequence[StabilityIssue], **more: float
    ) -> None:
        """Write the reading of a sampled step.

        Args:
            reading: the reading.
            open_issues: every issue open after it.
            **more: further scalars, written as ``stability/<name>``.
        """
        self.open_sinks()
        scalars = dashboard_scalars(reading, open_issues, alarms=self.alarms)
        self._sinks.write_reading(
            reading, scalars | {f"stability/{name}": value for name, value in more.items()}
        )
        self._count_failed()

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        """Write issues that opened, worsened or closed."""
        self.open_sinks()
        self._sinks.write_issues(issues)
        self._count_failed()

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Write the audit record of an intervention."""
        self.open_sinks()
        self._sinks.write_intervention(record)
        self._count_failed()

    def close(self) -> None:
        """Close the sinks."""
        self._meta = None
        self._sinks.close()
        self._count_failed()

    @contained
    def _make_folder(self) -> Path | None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _count_failed(self) -> None:
        if self._sinks.troubled:
            self.boundary.errors["sink"] = len(self._sinks.troubled)
