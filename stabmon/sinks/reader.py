"""Reader of the files of :class:`~stabmon.sinks.jsonl.JsonlSink`.

The run may have been killed, or may be still going.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from stabmon._display.html import card, line
from stabmon._storage import strict_json
from stabmon.incidents import Incident, IncidentLog
from stabmon.incidents.html import incident_table
from stabmon.records import SEVERITIES, LayerInfo, Reading, StabilityIssue, counted
from stabmon.sinks.delivery.gaps import Gap
from stabmon.sinks.jsonl import GAPS, INTERVENTIONS, ISSUES, META, READINGS, SCHEMA_VERSION
from stabmon.sinks.stored.frames import frame_of
from stabmon.sinks.stored.lines import audit_of, marks_of

T = TypeVar("T")
logger = logging.getLogger("stabmon")


@dataclass(frozen=True, eq=False)
class Records:
    """All records of the runs in a folder, run after run.

    A second ``train()`` is a run of its own.
    """

    readings: tuple[Reading, ...]
    """In the order of steps within a run, one a step."""
    issues: tuple[StabilityIssue, ...]
    """Every opening, worsening and closing, in the order of steps within a run."""
    interventions: tuple[Mapping[str, Any], ...]
    meta: Mapping[str, Any]
    """The meta.json of the newest start; empty where it is missing."""
    skipped: tuple[str, ...] = ()
    """File, line and reason of every line that could not be read."""
    folder: Path = Path()
    """The folder that holds the files."""
    runs: tuple[Records, ...] = ()
    """Each run alone, oldest first; empty in one of these."""
    number: int = 0
    """Number of the run in its folder, from 1; 0 for all of them together."""
    gaps: tuple[Gap, ...] = ()
    """Records that could not be written, and are missing here."""
    layers_left_out: Mapping[int, int] = field(default_factory=dict)
    """Number of layers that a reading lacks, by its step, where layers take turns.

    A line holds a bounded number of values, see :class:`~stabmon.sinks.jsonl.JsonlSink`: a layer
    that is not in ``Reading.layers`` then was measured and not written. Empty where there are
    several runs: see each of ``runs``.
    """

    def __repr__(self) -> str:
        steps = (
            f", steps {self.readings[0].step} to {self.readings[-1].step}" if self.readings else ""
        )
        partial = sum(len(run.layers_left_out) for run in self.runs or (self,))
        counts = (
            *([counted(len(self.runs), "run")] if len(self.runs) > 1 else []),
            f"{counted(len(self.readings), 'reading')}{steps}",
            counted(len(self.issues), "issue"),
            counted(len(self.interventions), "intervention"),
            *([f"layers take turns in {counted(partial, 'reading')}"] if partial else []),
        )
        return f"Records({self.folder}: {', '.join(counts)})"

    def _repr_html_(self) -> str:
        """Return the incidents and the newest reading, for notebooks."""
        newest = self.runs[-1] if self.runs else self
        worst = max((i.severity for i in newest.incidents), key=SEVERITIES.index, default="info")
        return card(
            repr(self),
            line(self.readings[-1] if self.readings else "no reading yet"),
            incident_table(newest.incidents),
            severity=worst,
        )

    @cached_property
    def incidents(self) -> tuple[Incident, ...]:
        """Newest state of each incident, run after run: its issues with one cause, in words."""
        if self.runs:
            return tuple(each for run in self.runs for each in run.incidents)
        log = IncidentLog(str(self.meta.get("framework", "loop")))
        for _, of_step in groupby(self.issues, key=lambda issue: issue.step):
            log.update(list(of_step))
        return log.all

    def to_pandas(self, what: str = "readings") -> Any:
        """Return records as one table in long format.

        ``readings`` has one row per head of each reading, with the columns ``run``, ``step``,
        ``loss``, ``learning_rate``, ``layer``, ``head`` and one for each signal, NaN where it was
        not measured. A reading without layers is one row with neither layer nor head. ``issues``
        and ``incidents`` have one row per record and one column per field, ``interventions`` one
        per entry of its audit records; each has ``run`` besides.

        Args:
            what: ``readings``, ``issues``, ``interventions`` or ``incidents``.

        Returns:
            A ``pandas.DataFrame``.

        Raises:
            ValueError: for another ``what``.
            ImportError: if pandas is not installed.

        Example:
            >>> import numpy as np
            >>> heads = {"h.0": {"max_logit": np.array([1.5, 2.0])}}
            >>> table = Records((Reading(10, 2.5, heads),), (), (), {}).to_pandas()
            >>> table.groupby("step")["max_logit"].max().to_dict()
            {10: 2.0}
        """
        return frame_of(what, [(run.number, run) for run in self.runs or (self,)])


def read_records(run_dir: str | Path) -> Records:
    """Read the records of a run.

    A resumed run writes some steps twice. Of readings, issues and interventions alike, what an
    earlier start wrote from the step of a later start's first reading on is left out; within a
    start, the last line for a step wins. Runs that began anew in the same folder stand beside each
    other.

    A line that cannot be read is skipped, listed in ``skipped`` and warned about; only an
    unfinished last line, the usual trace of a kill or of a run that is writing right now, goes
    without a warning.

    Args:
        run_dir: the run's output folder, or the ``stabmon`` folder in it.

    Returns:
        The records of all runs in the folder, and of each alone in ``runs``.

    Raises:
        ValueError: if there are no records there, or they cannot be opened.

    Example:
        >>> import tempfile
        >>> from stabmon.sinks.jsonl import JsonlSink
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = JsonlSink()
        ...     sink.open(Path(folder), {})
        ...     sink.write_reading(Reading(10, 2.5, {}), {})
        ...     sink.close()
        ...     read_records(folder).readings
        (Reading(step=10, loss=2.5, 0 layers, 0 heads),)
    """
    folder = _folder(Path(run_dir))
    skipped: list[str] = []
    known: dict[str, LayerInfo] = {}
    try:
        meta = _meta(folder / META, skipped)
        lines = list(_lines(folder / READINGS, skipped, lambda values: _reading(values, known)))
        issues = list(_lines(folder / ISSUES, skipped, StabilityIssue.from_dict))
        interventions = list(_lines(folder / INTERVENTIONS, skipped, audit_of))
        gaps = list(_lines(folder / GAPS, skipped, Gap.from_dict))
    except OSError as error:
        raise ValueError(f"the stabmon records in {folder} cannot be read: {error}") from error
    readings = [(run, start, reading) for run, start, (reading, _) in lines]
    left_out = {id(reading): count for *_, (reading, count) in lines if count}
    numbers = sorted({run for lines in (readings, issues, interventions) for run, _, _ in lines})
    runs = []
    for run in numbers:
        own, kept, done = _of_run(run, readings, issues, interventions)
        runs.append(
            Records(
                own,
                kept,
                done,
                meta,
                (),
                folder,
                number=run,
                gaps=tuple(gap for number, _, gap in gaps if number == run),
                layers_left_out={
                    each.step: left_out[id(each)] for each in own if id(each) in left_out
                },
            )
        )
    return Records(
        readings=tuple(each for run in runs for each in run.readings),
        issues=tuple(each for run in runs for each in run.issues),
        interventions=tuple(each for run in runs for each in run.interventions),
        meta=meta,
        skipped=tuple(skipped),
        folder=folder,
        runs=tuple(runs),
        gaps=tuple(gap for _, _, gap in gaps),
        layers_left_out=runs[0].layers_left_out if len(runs) == 1 else {},
    )


def _of_run(
    run: int,
    readings: list[tuple[int, int, Reading]],
    issues: list[tuple[int, int, StabilityIssue]],
    interventions: list[tuple[int, int, dict[str, Any]]],
) -> tuple[tuple[Reading, ...], tuple[StabilityIssue, ...], tuple[Mapping[str, Any], ...]]:
    """Return one run's records; a later start wins from its first reading on."""
    own = [(start, reading) for number, start, reading in readings if number == run]
    first: dict[int, int] = {}
    for start, reading in own:
        first[start] = min(reading.step, first.get(start, reading.step))
    ends = ends_of_starts(first)
    by_step = {
        reading.step: reading for start, reading in own if reading.step < ends.get(start, math.inf)
    }
    kept = [
        issue
        for number, start, issue in issues
        if number == run and issue.step < ends.get(start, math.inf)
    ]
    done = [
        record
        for number, start, record in interventions
        if number == run and record.get("step", 0) < ends.get(start, math.inf)
    ]
    return (
        tuple(by_step[step] for step in sorted(by_step)),
        tuple(sorted(kept, key=lambda issue: issue.step)),
        tuple(done),
    )


def _folder(path: Path) -> Path:
    """Return the folder that holds the files, given it or the run folder."""
    for folder in (path / "stabmon", path):
        if (folder / READINGS).is_file():
            return folder
    raise ValueError(
        f"no stabmon records in {path}: give the run folder that holds stabmon/{READINGS}"
    )


def _lines(
    path: Path, skipped: list[str], parse: Callable[[dict[str, Any]], T]
) -> Iterator[tuple[int, int, T]]:
    """Yield (run, start, record) of readable lines, and add others to ``skipped``."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = strict_json.loads(line)
                version = values.pop("schema_version")
                if version != SCHEMA_VERSION:
                    raise ValueError(
                        f"schema_version is {version!r}, this stabmon reads {SCHEMA_VERSION}"
                    )
                run, start = marks_of(values)
                record = parse(values)
            except Exception as error:  # a damaged line may fail in any way
                skipped.append(f"{path.name} line {number}: {type(error).__name__}: {error}")
                if line.endswith(b"\n"):
                    logger.warning(
                        "%s line %d cannot be read and is skipped: %s: %s",
                        path,
                        number,
                        type(error).__name__,
                        error,
                    )
            else:
                yield run, start, record


def _reading(values: Mapping[str, Any], known: dict[str, LayerInfo]) -> tuple[Reading, int]:
    """Return a line's reading, and how many layers it lacks.

    Args:
        values: the line.
        known: carries the layers' facts of earlier lines.
    """
    left_out = values.get("layers_left_out", 0)
    if not isinstance(left_out, int) or left_out < 0:
        raise ValueError(f"layers_left_out is {left_out!r}, not a number of layers")
    new = {layer: LayerInfo.from_dict(info) for layer, info in values.get("info", {}).items()}
    info = {layer: (known | new)[layer] for layer in values["layers"] if layer in known | new}
    reading = Reading.from_dict(values, info=info)
    known |= new
    return reading, left_out


def _meta(path: Path, skipped: list[str]) -> dict[str, Any]:
    """Return meta.json; empty where it is missing or broken."""
    try:
        return strict_json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except Exception as error:
        skipped.append(f"{path.name}: {error}")
        logger.warning("%s cannot be read and is skipped: %s", path, error)
        return {}


def ends_of_starts(first_steps: Mapping[int, int]) -> dict[int, int]:
    """Return, for each start of a run, the step from which on a later start wins.

    Args:
        first_steps: start -> step of its first reading, of the starts that have one.

    Example:
        >>> ends_of_starts({1: 10, 3: 40})
        {1: 40, 2: 40}
    """
    return {
        start: min(step for later, step in first_steps.items() if later > start)
        for start in range(min(first_steps, default=1), max(first_steps, default=1))
    }
