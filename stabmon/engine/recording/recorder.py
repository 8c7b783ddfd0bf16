"""Keep a run's issues, and write readings, issues and interventions to its sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from stabmon._storage.folder_claim import FolderClaim
from stabmon._torch.isolation import random_state_kept
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.incidents import Incident, IncidentLog
from stabmon.incidents.intervention_words import is_armed
from stabmon.records import Reading, StabilityIssue, head_count
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars

logger = logging.getLogger("stabmon")

ISSUES_KEPT = 10_000
"""Issues kept in memory and in states; of older ones those stay that are open, others by number.

All are in ``issues.jsonl``.
"""


class Recorder:
    """The issues of a run in memory, and everything recorded of it in its sinks.

    Args:
        sinks: where to write to; none on ranks that do not write.
        folder: ``<run_dir>/stabmon``, made with the first record or step; None where nothing goes
            to disk.
        boundary: counts what fails.
        on_issues: called with the issues of a step, once they are written.
        report: write a page of the run as it ends.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        folder: Path | None,
        boundary: ErrorBoundary,
        on_issues: Callable[[Sequence[StabilityIssue]], None] | None = None,
        *,
        report: bool = False,
    ) -> None:
        self.boundary = boundary
        self.issues: list[StabilityIssue] = []
        """Newest issues, and every one that is open."""
        self.alarms = 0
        """Number of issues of severity error or above in the whole run."""
        self._sinks, self._on_issues = SinkGroup(sinks), on_issues
        self.folder, self._report = folder, report
        """The folder of the records; another than was asked for where a monitor is writing there."""
        self._claim: FolderClaim | None = None
        self._opened: float | None = None
        self._layers: dict[str, int] = {}
        self._incidents = IncidentLog()
        self._meta: Callable[[], Mapping[str, Any]] | None = None
        self._early: list[Mapping[str, Any]] = []
        """Audit records from before the sinks are opened."""

    def set_meta(self, meta: Callable[[], Mapping[str, Any]]) -> None:
        """Set the function that returns the run's metadata, for ``meta.json``.

        The sinks are opened later, by :meth:`open_sinks`: a run without a step leaves no file.
        """
        self._meta = meta

    @contained
    def open_sinks(self) -> None:
        """Open the sinks at the first record or step; later do nothing."""
        make, self._meta = self._meta, None
        if make is not None:
            meta = make()
            self._incidents = IncidentLog(str(meta.get("framework", "loop")))
            self._replay(self.issues)
            with random_state_kept():  # a name that MLflow makes up for a run draws from Python's
                self._sinks.open(self._make_folder() if self._sinks.sinks else None, meta)
            self._opened = time.monotonic()
            early, self._early = self._early, []
            for record in early:
                self._sinks.write_intervention(record)
            self._count_failed()

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Add to the run's metadata after the sinks were opened."""
        self._sinks.amend(meta)
        self._count_failed()

    def keep(self, issues: Sequence[StabilityIssue]) -> None:
        """Add to the issues of the run, without writing them."""
        self.issues += issues
        self.alarms += sum(issue.is_alarm for issue in issues)
        if len(self.issues) > 2 * ISSUES_KEPT:
            self.issues[:] = newest_and_open(self.issues, ISSUES_KEPT)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """Newest change of each incident of the run, in order."""
        return self._incidents.all

    def restore(self, issues: Sequence[StabilityIssue], alarms: int | None = None) -> None:
        """Replace the issues of the run by those of a stored state.

        Args:
            issues: the issues that the state has.
            alarms: alarms of the whole run; None to count those of ``issues``.
        """
        self.issues, self.alarms = [], 0
        self._early.clear()  # what was installed at the start is what the state holds already
        self.keep(issues)
        self.alarms = self.alarms if alarms is None else alarms
        self._replay(issues)

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
        self._amend_layers(reading)
        self._sinks.write_reading(
            reading, scalars | {f"stability/{name}": value for name, value in more.items()}
        )
        self._count_failed()

    def write_issues(self, issues: Sequence[StabilityIssue]) -> tuple[Incident, ...]:
        """Write issues that opened, worsened or closed; return the incidents that changed."""
        self.open_sinks()
        incidents = self._group(issues)
        self._sinks.write_issues(issues)
        self._sinks.write_incidents(incidents)
        self._count_failed()
        self._call_on_issues(issues)
        return tuple(incidents)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Write the audit record of an intervention.

        Those of what is in place from the start come no sooner than the first step: until then a
        state may be loaded, which has them already.
        """
        if self._meta is not None and is_armed(record):
            self._early.append(record)
            return
        self.open_sinks()
        self._sinks.write_intervention(record)
        self._count_failed()

    def flush(self) -> None:
        """Wait until the records so far are written, as a stored state counts on; at most 2 s."""
        self._sinks.flush()

    def close(self, steps: int = 0) -> None:
        """Close the sinks, and write the page of the run.

        Args:
            steps: optimizer steps of the run.
        """
        self._meta = None
        if self._opened is not None and steps:
            self.amend({"steps": steps})
        writes = bool(self._sinks.sinks)
        self._sinks.close()
        self._count_failed()
        if writes and self._opened is not None:
            self._write_report(time.monotonic() - self._opened)
        self._opened = None
        if self._claim is not None:
            self._claim.release()

    @contained
    def _call_on_issues(self, issues: Sequence[StabilityIssue]) -> None:
        if self._on_issues is not None:
            self._on_issues(issues)

    def _group(self, issues: Sequence[StabilityIssue]) -> list[Incident]:
        """Return the incidents that the issues of a step change."""
        try:
            return self._incidents.update(issues)
        except Exception as error:  # the issues must reach the sinks whatever happens here
            self.boundary.failed("incidents", error)
            return []

    def _replay(self, issues: Sequence[StabilityIssue]) -> None:
        """Take the issues of the run so far, without writing them."""
        for _, of_step in groupby(issues, key=lambda issue: issue.step):
            self._group(list(of_step))

    def _amend_layers(self, reading: Reading) -> None:
        """Add the layers and their heads to the metadata, once they are known."""
        layers = {layer: head_count(signals) for layer, signals in reading.layers.items()}
        if layers and layers != self._layers:
            self._layers = {**self._layers, **layers}
            self.amend({"layers": self._layers})

    @contained
    def _write_report(self, seconds: float) -> None:
        """Write the page of the run, of records in a folder that was asked for."""
        if self.folder is None or not self._report:
            return
        from stabmon.report.run.at_close import write_page_at_close

        if write_page_at_close(self.folder, seconds) is None and self.folder.is_dir():
            logger.info(
                "the page of this run is left out; stabmon report %s writes it", self.folder
            )

    @contained
    def _make_folder(self) -> Path | None:
        if self.folder is not None:
            self._claim = FolderClaim(self.folder)
            self.folder = self._claim.folder
        return self.folder

    def _count_failed(self) -> None:
        if self._sinks.troubled:
            self.boundary.errors["sink"] = len(self._sinks.troubled)


def newest_and_open(issues: Sequence[StabilityIssue], count: int) -> list[StabilityIssue]:
    """Return the newest issues, and before them the last of each place that is open.

    Args:
        issues: issues in the order in which they were emitted.
        count: number of the newest to return.

    Example:
        >>> from dataclasses import replace
        >>> issue = StabilityIssue(1, "h.0", 0, "logit_growth", "error", 9.0, 5.0, "")
        >>> other = replace(issue, head=1)
        >>> closed, newest = replace(other, step=2, state="closed"), replace(issue, step=3, head=2)
        >>> [each.head for each in newest_and_open([issue, other, closed, newest], 1)]
        [0, 2]
    """
    old, newest = issues[:-count], issues[-count:]
    last = {issue.key: issue for issue in old}
    still_open = {id(issue) for issue in last.values() if issue.state != "closed"}
    return [issue for issue in old if id(issue) in still_open] + list(newest)
