"""Records as files, one JSON object per line, whole even after a kill.

:mod:`stabmon.sinks.reader` reads them back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stabmon._storage import strict_json
from stabmon._storage.atomic_write import write_text
from stabmon._storage.file_lock import locked, try_lock, unlock
from stabmon.records import LayerInfo, Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.delivery.gaps import Gap
from stabmon.sinks.stored.layer_share import LayerShare
from stabmon.sinks.stored.thinning import MOST_BYTES, thin

logger = logging.getLogger("stabmon")

SCHEMA_VERSION = 1
READINGS, ISSUES, INTERVENTIONS, META = (
    "readings.jsonl",
    "issues.jsonl",
    "interventions.jsonl",
    "meta.json",
)
GAPS = "gaps.jsonl"
"""File of what is missing; it exists only where something is."""
DIGITS = 8
"""Significant digits of numbers in readings.jsonl."""


@sink
class JsonlSink(Sink):
    """Write a run's records as JSON lines into its stabmon folder.

    The files are ``readings.jsonl``, ``issues.jsonl``, ``interventions.jsonl`` and ``meta.json``.
    Every line is a JSON object with ``schema_version``, the record's own fields (a reading: ``step,
    loss, layers, learning_rate, gradients, query_key, losses, micro_batches, non_finite,
    overhead_fraction, learning_rates, rate_factors, overshoot, updates, parts, weight_decays,
    query_key_groups`` and, where it changed, ``info``) and ``run`` and ``start``. Numbers of readings
    have 8 significant digits, others all of theirs. A NaN or an infinity is null, and the line's
    ``nonfinite`` field says which and where: see :data:`stabmon._storage.strict_json.ENCODING`,
    repeated in meta.json.

    A line is handed to the operating system in one write, so a killed process leaves every line
    complete but perhaps the last, which the next start cuts off. Records that wait for the thread
    of this sink are lost with it. A power failure may cost the lines of the last seconds.

    Readings are bounded. A line has at most 150,000 values of heads: of a larger model it holds the
    layers with an open issue, the others take turns, and ``layers_left_out`` counts those that are
    not in it. Where an issue opens in one of these, the line of its step is written again with it.
    Once ``readings.jsonl`` is larger than ``most_bytes``, every second line of its older half is
    removed, and so again each time: the older, the further apart. A step with an issue, the first
    line of a start and one with facts about layers stay. Issues and interventions all stay.

    What could not be written is a line of ``gaps.jsonl``: ``kind``, ``first_step``, ``last_step``,
    ``count`` and ``reason``.

    Other than that, files are only ever appended to. ``start`` counts the times the folder was opened: a resumed run
    may write some steps a second time, and the later start wins from its first reading on. ``run``
    counts the runs that began at step 1 in this folder, as a second ``train()`` does: each has its
    own steps. meta.json is the newest start's, and lists them all in ``starts``; ``ended`` is added
    to it where the sink was closed, and missing after a kill. Two monitors that write to one folder
    at the same time are two runs, and the second says so.

    Nothing is written where ``run_dir`` is None.

    Args:
        most_bytes: size of ``readings.jsonl`` above which older readings are thinned.

    Raises:
        OSError: if a file cannot be written (disk full, folder deleted).
    """

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._share = LayerShare()
        self._newest: Reading | None = None
        """The newest reading, of which the file lacks some layers."""
        self._written: set[str] = set()
        """Layers of the newest reading that are in the file."""
        self._in_trouble: dict[tuple[str, str | None, int | None], str] = {}
        """The layer of each open issue."""
        self._thin_at = most_bytes
        self._is_alone = True
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
        self._newest, self._in_trouble, self._thin_at = None, {}, self._most_bytes
        for name in (READINGS, ISSUES, INTERVENTIONS):
            self._files[name] = _opened(run_dir / name)
        is_alone = self._is_alone = try_lock(self._files[READINGS])
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
        layers = self._share.chosen(reading.layers, set(self._in_trouble.values()))
        self._write_layers(reading, layers)
        self._thin_if_due()

    def _write_layers(self, reading: Reading, layers: Sequence[str]) -> None:
        """Write a line of a reading with some of its layers."""
        left_out = len(reading.layers) - len(layers)
        shown = replace(reading, layers={layer: reading.layers[layer] for layer in layers})
        record = shown.to_dict()
        del record["sampled"], record["info"]
        if left_out:
            record["layers_left_out"] = left_out
        changed = {
            layer: info for layer, info in reading.info.items() if self._info.get(layer) != info
        }
        if changed:
            record["info"] = {layer: info.to_dict() for layer, info in changed.items()}
        self._append(READINGS, record, DIGITS)
        self._info.update(changed)
        self._newest, self._written = (reading if left_out else None), set(layers)

    def write_issue(self, issue: StabilityIssue) -> None:
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        for issue in issues:
            self._append(ISSUES, issue.to_dict())
            if issue.state == "closed" or issue.layer is None:
                self._in_trouble.pop(issue.key, None)
            else:
                self._in_trouble[issue.key] = issue.layer
        newest = self._newest
        if newest is None or not any(issue.step == newest.step for issue in issues):
            return
        lacking = [layer for layer in self._in_trouble.values() if layer in newest.layers]
        if not self._written.issuperset(lacking):
            wanted = self._written.union(lacking)
            self._write_layers(newest, [layer for layer in newest.layers if layer in wanted])

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self._append(INTERVENTIONS, record)

    def write_gap(self, gap: Gap) -> None:
        if self._dir is None or not self._files:
            return
        if GAPS not in self._files:
            self._files[GAPS] = _opened(self._dir / GAPS)
        self._append(GAPS, gap.to_dict())

    def close(self) -> None:
        if self._files and not self._unfinished:
            with contextlib.suppress(OSError):  # of what is lost, the lost records are reported
                self.amend({"ended": utc_now()})
        while self._files:
            file = self._files.popitem()[1]
            unlock(file)  # a forked process may have it open still
            os.close(file)

    def _append(self, name: str, record: Mapping[str, Any], digits: int | None = None) -> None:
        """Add one line, in one write where the system takes it whole."""
        file = self._files.get(name)
        if file is None or self._dir is None:
            return
        if os.fstat(file).st_nlink == 0:
            raise FileNotFoundError(
                f"{name} in {self._dir} was deleted while the run was writing to it"
            )
        marks = {"run": self._run, "start": self._start}
        whole = {"schema_version": SCHEMA_VERSION, **record, **marks}
        line = strict_json.dumps(whole, digits=digits).encode() + b"\n"
        if name in self._unfinished:
            _cut_unfinished_line(self._dir / name)
        self._unfinished.add(name)
        while line:
            line = line[os.write(file, line) :]
        self._unfinished.remove(name)

    def _thin_if_due(self) -> None:
        """Remove older readings where the file has become too large and is this monitor's alone."""
        file = self._files.get(READINGS)
        if file is None or self._dir is None or os.fstat(file).st_size <= self._thin_at:
            return
        path, is_newest = self._dir / READINGS, False
        with contextlib.suppress(OSError):
            is_newest = _meta_before(self._dir / META)["start"] <= self._start
        if self._is_alone and is_newest:
            with contextlib.suppress(OSError):  # no space for a copy: the file stays as it is
                thin(path, self._dir / ISSUES)
                fresh = _opened(path)
                try_lock(fresh)
                self._files[READINGS] = fresh
                unlock(file)
                os.close(file)
        left = os.fstat(self._files[READINGS]).st_size
        # where little could go, not at every line again
        self._thin_at = self._most_bytes if left < 0.9 * self._most_bytes else left * 3 // 2


def _opened(path: Path) -> int:
    """Open a file to append to."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


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
