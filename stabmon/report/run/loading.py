"""Stored runs as a page needs them: records, incidents, state."""

from __future__ import annotations

import logging
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from stabmon._storage import strict_json
from stabmon.incidents import Incident, IncidentLog
from stabmon.records import counted
from stabmon.report.run.signals import HeadSignals, head_signals
from stabmon.sinks.jsonl import INTERVENTIONS, ISSUES, READINGS
from stabmon.sinks.reader import Records, read_records

logger = logging.getLogger("stabmon")

SILENCE = 600.0
"""Seconds without a record after which a run without an end is taken for stopped."""
CHECK = "check.json"
"""File in the run folder, or in its ``stabmon`` folder, written by ``stabmon check --json``."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a page."""

    folder: Path
    """The folder that holds its files."""
    name: str
    """A name that no other run of the page has."""
    records: Records
    """The run alone."""
    earlier: tuple[Records, ...] = ()
    """Runs that were made before it in the same folder."""
    number: int = 1
    """Place among the runs of the folder, from 1."""
    age: float = 0.0
    """Seconds since the last record."""
    check: Mapping[str, Any] | None = None
    """Report of a check before training."""
    letter: str = "A"
    """Its letter on the page."""
    changes: tuple[Incident, ...] = field(default=())
    """Every change of every incident, in the order of steps."""
    open: tuple[Incident, ...] = ()
    """Newest change of each incident that is open at the end, the worst first."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """Content of meta.json; of the newest start, whichever run is shown."""
        return self.records.meta

    @property
    def is_newest(self) -> bool:
        """True for the newest run of its folder, which meta.json describes."""
        return bool(self.meta.get("run", self.number) == self.number)

    @cached_property
    def signals(self) -> HeadSignals:
        """Values of every head at every sampled step."""
        return head_signals(self.records.readings, self.records.layers_left_out)

    @property
    def last_step(self) -> int:
        """The newest step that any record names, or the run ended at; 0 for none."""
        ended = self.meta.get("steps") if self.is_newest and self.meta.get("ended") else None
        steps = [ended] if isinstance(ended, int) else []
        steps += [reading.step for reading in self.records.readings[-1:]]
        steps += [issue.step for issue in self.records.issues[-1:]]
        return max(
            [*steps, *(int(each.get("step", 0)) for each in self.records.interventions[-1:])],
            default=0,
        )

    @property
    def is_empty(self) -> bool:
        """True where nothing was measured and nothing found."""
        return not self.records.readings and not self.records.issues

    @property
    def first_step(self) -> int:
        """The first step with a record; 0 for none."""
        readings = self.records.readings
        if not readings:
            return 0
        return min([readings[0].step, *(step for step, _ in readings[0].losses)])

    @property
    def unit(self) -> str:
        """The unit of its steps."""
        return "forward" if self.meta.get("what") == "controllers" else "step"

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        """The starts of this run, the first one included."""
        found = [each for each in self.meta.get("starts", ()) if isinstance(each, Mapping)]
        return [each for each in found if each.get("run", 1) == self.number]

    @property
    def state(self) -> str:
        """``ended``, ``running``, ``stopped`` (no end was recorded) or ``unknown``."""
        if self.meta.get("ended") or not self.is_newest:
            return "ended"
        if self.age < SILENCE:
            return "running"
        return "stopped" if self.meta.get("started") else "unknown"

    @cached_property
    def incidents(self) -> tuple[Incident, ...]:
        """Newest change of each incident, in the order of their numbers."""
        newest = {each.number: each for each in self.changes}
        return tuple(newest[number] for number in sorted(newest))

    def of(self, number: int) -> list[Incident]:
        """Return the changes of one incident."""
        return [each for each in self.changes if each.number == number]

    def is_open(self, incident: Incident) -> bool:
        """Return whether an incident is open at the end."""
        return any(each.number == incident.number for each in self.open)


def load_run(path: str | Path, number: int | None = None) -> Run:
    """Load a run.

    Args:
        path: the run's output folder, or the ``stabmon`` folder in it.
        number: of the runs in that folder, from 1; None for the newest.

    Returns:
        The run.

    Raises:
        ValueError: if there are no records, or no run of that number.
    """
    records = read_records(path)
    runs = records.runs
    if number is not None and not 1 <= number <= len(runs):
        raise ValueError(
            f"{path}#{number}: the folder holds {counted(len(runs), 'run')}, counted from 1"
        )
    place = len(runs) if number is None else number
    one = runs[place - 1] if runs else records
    log = IncidentLog(str(records.meta.get("framework", "loop")))
    changes = [
        change
        for _, issues in groupby(one.issues, key=lambda issue: issue.step)
        for change in log.update(tuple(issues))
    ]
    return Run(
        folder=records.folder,
        name=_name(records.folder),
        records=replace(one, skipped=records.skipped),
        earlier=runs[: place - 1],
        number=max(place, 1),
        age=max(0.0, time.time() - last_written(records.folder)),
        check=_check(records.folder),
        changes=tuple(changes),
        open=tuple(log.open),
    )


def load_runs(paths: Sequence[tuple[str | Path, int | None]]) -> list[Run]:
    """Load several runs, with a letter and a name of its own for each.

    Args:
        paths: folder and number of each, as :func:`load_run` takes them.
    """
    runs = [load_run(path, number) for path, number in paths]
    names = [run.name for run in runs]
    for depth in range(2, 6):
        if len(set(names)) == len(names):
            break
        names = [_name(run.folder, depth) for run in runs]
    names = [
        f"{name}#{run.number}" if names.count(name) > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]
    letters = string.ascii_uppercase
    return [
        replace(run, name=name, letter=letters[at % 26] * (1 + at // 26))
        for at, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def last_written(folder: Path) -> float:
    """Return the time of the newest record in a folder, in seconds since 1970."""
    times = []
    for name in (READINGS, ISSUES, INTERVENTIONS):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=time.time())


def when(stamp: Any) -> str:
    """Return a stored time in words of the local time zone; empty if it is none."""
    try:
        return f"{datetime.fromisoformat(str(stamp)).astimezone():%Y-%m-%d %H:%M %Z}"
    except ValueError:
        return ""


def _name(folder: Path, depth: int = 1) -> str:
    """Return the last ``depth`` parts of the run folder's path."""
    folder = folder.absolute()
    run = folder.parent if folder.name == "stabmon" else folder
    return "/".join(run.parts[-depth:]) or str(run)


def _check(folder: Path) -> Mapping[str, Any] | None:
    """Return the stored report of a check, if there is one that can be read."""
    for path in (folder / CHECK, folder.parent / CHECK):
        if path.is_file():
            try:
                return strict_json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be read and is left out: %s", path, error)
    return None
