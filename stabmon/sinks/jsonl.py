"""Records as files, one JSON object per line, whole even after a kill.

:mod:`stabmon.sinks.reader` reads them back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stabmon._storage import strict_json
from stabmon._storage.atomic_write import write_text
from stabmon._storage.file_lock import locked, try_lock, unlock
from stabmon.records import LayerInfo, Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink

logger = logging.getLogger("stabmon")

SCHEMA_VERSION = 1
READINGS, ISSUES, INTERVENTIONS, META = (
    "readings.jsonl",
    "issues.jsonl",
    "interventions.jsonl",
    "meta.json",
)


@sink
class JsonlSink(Sink):
    """Write a run's records as JSON lines into its stabmon folder.

    The files are ``readings.jsonl``, ``issues.jsonl``, ``interventions.jsonl`` and ``meta.json``.
    Every line is a JSON object with ``schema_version``, the record's own fields (a reading: ``step,
    loss, layers, learning_rate, gradients, query_key, losses, micro_batches, non_finite,
    overhead_fraction, learning_rates, rate_factors, overshoot, updates, parts, weight_decays,
    query_key_groups`` and, where it changed, ``info``) and ``run`` and ``start``. Values are not
    rounded. A NaN or an infinity is null, and the line's ``nonfinite`` field says which and where:
    see :data:`stabmon._storage.strict_json.ENCODING`, repeated in meta.json.

    A line is handed to the operating system in one write, so a killed process leaves every line
    complete but perhaps the last, which the next start cuts off. A power failure may cost the lines
    of the last seconds.

    Files are only ever appended to. ``start`` counts the times the folder was opened: a resumed run
    may write some steps a second time, and the later start wins from its first reading on. ``run``
    counts the runs that began at step 1 in this folder, as a second ``train()`` does: each has its
    own steps. meta.json is the newest start's, and lists them all in ``starts``; ``ended`` is added
    to it where the sink was closed, and missing after a kill. Two monitors that write to one folder
    at the same time are two runs, and the second says so.

    Nothing is written where ``run_dir`` is None.

    Raises:
        OSError: if a file cannot be written (disk full, folder deleted).
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._dir: Path | None = None
        self._start = self._run = 1
        self._unfinished: set[str] = set()
        self._info: dict[str, LayerInfo] = {}
        self._meta: dict[str, Any] = {}

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        if run_dir is None:
            return
        self._dir = run_dir
        self._unfinished, self._info = set(), {}
        for name in (READINGS, ISSUES, INTERVENTIONS):
            self._files[name] = os.open(
                run_dir / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        is_alone = try_lock(self._files[READINGS])
        if is_alone:  # else the last line may be one that is being written
            for name in self._files:
                _cut_unfinished_line(run_dir / name)
        with locked(self._files[ISSUES]):  # two starts at the same time have different numbers
            self._number(run_dir, meta)
        if not is_alone:
            logger.warning(
                "stabmon: another monitor has %s open at this moment: the records of this one are "
                "run %d there; give each a run_dir of its own",
                run_dir,
                self._run,
            )

    def _number(self, run_dir: Path, meta: Mapping[str, Any]) -> None:
        """Take the next numbers of run and start in a folder, and write meta.json."""
        before = _meta_before(run_dir / META)
        self._start = before["start"] + 1
        self._run = before["run"] + (meta.get("continues") is False or not before["run"])
        this = {"start": self._start, "run": self._run}
        this |= {key: meta[key] for key in ("started", "first_step") if key in meta}
        own = {
            "schema_version": SCHEMA_VERSION,
            "run": self._run,
            "start": self._start,
            "starts": [*before["starts"], this],
            "nonfinite_encoding": strict_json.ENCODING,
        }
        self._meta = {**own, **meta}
        write_text(run_dir / META, strict_json.dumps(self._meta) + "\n")

    def amend(self, meta: Mapping[str, Any]) -> None:
        if self._dir is None:
            return
        self._meta |= meta
        if _meta_before(self._dir / META)["start"] <= self._start:  # else it is a later start's
            write_text(self._dir / META, strict_json.dumps(self._meta) + "\n")

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        record = reading.to_dict()
        del record["sampled"], record["info"]
        changed = {
            layer: info for layer, info in reading.info.items() if self._info.get(layer) != info
        }
        if changed:
            record["info"] = {layer: info.to_dict() for layer, info in changed.items()}
        self._append(READINGS, record)
        self._info.update(changed)

    def write_issue(self, issue: StabilityIssue) -> None:
        self._append(ISSUES, issue.to_dict())

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self._append(INTERVENTIONS, record)

    def close(self) -> None:
        if self._files and not self._unfinished:
            with contextlib.suppress(OSError):  # of what is lost, the lost records are reported
                self.amend({"ended": utc_now()})
        while self._files:
            file = self._files.popitem()[1]
            unlock(file)  # a forked process may have it open still
            os.close(file)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line, in one write where the system takes it whole."""
        file = self._files.get(name)
        if file is None or self._dir is None:
            return
        if os.fstat(file).st_nlink == 0:
            raise FileNotFoundError(
                f"{name} in {self._dir} was deleted while the run was writing to it"
            )
        marks = {"run": self._run, "start": self._start}
        line = (
            strict_json.dumps({"schema_version": SCHEMA_VERSION, **record, **marks}).encode()
            + b"\n"
        )
        if name in self._unfinished:
            _cut_unfinished_line(self._dir / name)
        self._unfinished.add(name)
        while line:
            line = line[os.write(file, line) :]
        self._unfinished.remove(name)


def utc_now() -> str:
    """Return the present time in UTC, as in ``2026-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _meta_before(meta: Path) -> dict[str, Any]:
    """Return ``start``, ``run`` and ``starts`` of the newest start before this one.

    0, 0 and none for a new folder.
    """
    try:
        found = json.loads(meta.read_bytes())
        start, run = int(found["start"]), int(found.get("run", 1))
        starts = list(
            found.get("starts", [{"start": each, "run": 1} for each in range(1, start + 1)])
        )
        return {"start": start, "run": run, "starts": starts}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "%s is unreadable (%s) and is written anew; a resumed run may count as the run before "
            "it",
            meta,
            error,
        )
    return {"start": 0, "run": 0, "starts": []}


def _cut_unfinished_line(path: Path) -> None:
    """Cut off an unfinished last line, which a killed write has left.

    A last line that lacks only its newline gets one.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail, start = b"", end
        while start > 0 and b"\n" not in tail:
            block = min(1 << 16, start)
            start = file.seek(start - block)
            tail = file.read(block) + tail
        last = tail.rpartition(b"\n")[2]
        if not last:
            return
        try:
            strict_json.loads(last)
        except ValueError:
            file.truncate(end - len(last))
            logger.info("%s: cut off %d bytes of a line that was never finished", path, len(last))
        else:
            file.seek(end)
            file.write(b"\n")
