"""Sinks in the background: order, bounds, failures, forks, exits and kills."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabmon import read_records
from stabmon.records import Reading
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.delivery import delivery
from stabmon.sinks.delivery.calls import WaitingCalls, call_of, is_heard
from stabmon.sinks.delivery.gaps import Gap
from stabmon.sinks.jsonl import JsonlSink
from tests.support.sample_records import META, issue, reading

ROOT = Path(__file__).parents[3]


class Kept(Sink):
    """Keeps what it is given, and the threads that gave it."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.gaps: list[Gap] = []
        self.threads: set[str] = set()
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self._take(reading)

    def write_issue(self, issue: Any) -> None:
        self._take(issue)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self._take(record)

    def write_gap(self, gap: Gap) -> None:
        self.gaps.append(gap)

    def _take(self, record: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.records.append(record)

    @property
    def steps(self) -> list[int]:
        return [r["step"] if isinstance(r, dict) else r.step for r in self.records]


class Foreground(Kept):
    """The same on the thread that trains."""

    in_background = False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between tries."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(delivery, "SILENCE", 0.3)


def until(holds: Any, seconds: float = 10.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


def test_each_sink_has_its_thread_and_its_records_in_order() -> None:
    background, foreground = Kept(), Foreground()
    group = SinkGroup([background, foreground])
    group.open(None, META)
    for step in range(1, 101):
        group.write_reading(reading(step), {})
        if step % 10 == 0:
            group.write_issues([issue(step)])
            group.write_intervention({"step": step})
    group.close()
    assert background.steps == foreground.steps
    assert background.steps == sorted(background.steps)
    assert len(background.steps) == 120
    assert background.threads == {"stabmon Kept"}
    assert foreground.threads == {threading.current_thread().name}


def test_a_sink_that_keeps_up_has_written_when_the_call_returns() -> None:
    sink = Kept()
    group = SinkGroup([sink])
    group.open(None, META)
    late = 0
    for step in range(1, 101):
        group.write_reading(reading(step), {})
        late += sink.steps[-1:] != [step]
    group.close()
    assert late < 20, "but for moments in which the machine is busy"


def test_records_are_snapshots(quick: None) -> None:
    sink = Kept()
    sink.gate.clear()
    group = SinkGroup([sink])
    group.open(None, META)
    given, audit = reading(1), {"step": 1, "after": {"rate": [0.5]}}
    group.write_reading(given, {})
    group.write_intervention(audit)
    for signals in given.layers.values():
        for values in signals.values():
            values[:] = np.nan
    audit["after"]["rate"][0] = 9.0  # type: ignore[index]
    sink.gate.set()
    group.close()
    assert all(np.isfinite(v).all() for s in sink.records[0].layers.values() for v in s.values())
    assert sink.records[1] == {"step": 1, "after": {"rate": [0.5]}}


def test_a_sink_that_hangs_costs_one_short_wait_and_is_named_once(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    sink, healthy = Kept(), Counted()
    sink.gate.clear()
    group = SinkGroup([sink, healthy])
    group.open(None, META)
    begun = time.monotonic()
    for step in range(1, 51):
        group.write_reading(reading(step), {})
        time.sleep(0.01)
    took = time.monotonic() - begun
    assert took < 2.5, "each of 50 calls would have waited"
    assert healthy.count == 50
    begun = time.monotonic()
    group.close()
    assert time.monotonic() - begun < 5
    sink.gate.set()
    named = [m for m in caplog.messages if "Kept has not returned" in m]
    assert len(named) == 1
    assert caplog.messages[-1] == (
        "stabmon: Kept did not write everything. It has not returned for 0 s. "
        "50 records are lost: 50 readings of steps 1 to 50."
    )
    assert group.failed.keys() == {"Kept"}


class Counted(Sink):
    """Counts readings."""

    count = 0

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self.count += 1


def test_a_full_queue_drops_the_oldest_readings_before_anything_else() -> None:
    dropped: list[Any] = []
    waiting = WaitingCalls(dropped.append, most_records=4)
    for step in range(1, 4):
        waiting.append(call_of("write_reading", (reading(step), {}), step))
        waiting.append(call_of("write_issues", ([issue(step)],), step))
    assert [(call.kind, call.steps) for call in dropped] == [
        ("readings", (1, 1)),
        ("readings", (2, 2)),
    ]
    assert [call.kind for call in waiting] == ["issues", "issues", "readings", "issues"]
    for step in range(4, 8):
        waiting.append(call_of("write_intervention", ({"step": step},), step))
    assert [call.kind for call in waiting] == ["issues", "issues", "issues", "interventions"]
    assert [call.steps[0] for call in waiting] == [1, 2, 3, 7]


def test_a_queue_is_bounded_in_bytes() -> None:
    dropped: list[Any] = []
    waiting = WaitingCalls(dropped.append, most_bytes=100_000)
    for step in range(1, 20):
        waiting.append(call_of("write_reading", (reading(step, heads=1000), {}), step))
    assert len(waiting) == 2
    assert len(dropped) == 17


def test_metadata_that_waits_is_joined() -> None:
    waiting = WaitingCalls(print)
    for meta in ({"a": 1}, {"b": 2}, {"a": 3}):
        waiting.append(call_of("amend", (meta,), 1))
    assert [call.arguments for call in waiting] == [({"a": 3, "b": 2},)]


def test_a_sink_is_called_only_for_what_it_hears() -> None:
    assert is_heard(Kept(), "write_issues")
    assert not is_heard(Kept(), "write_incidents")
    assert not is_heard(Counted(), "write_issues")


def test_a_failure_is_tried_again_and_the_gap_is_given_and_told(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Kept()
    group = SinkGroup([sink])
    group._deliveries[0]._waiting = WaitingCalls(group._deliveries[0]._drop, most_records=5)
    group.open(None, META)
    group.write_reading(reading(1), {})
    until(lambda: sink.steps == [1])
    sink.error = OSError("disk full")
    for step in range(2, 22):
        group.write_reading(reading(step), {})
    time.sleep(0.2)
    sink.error = None
    until(lambda: len(sink.steps) >= 6)
    group.write_reading(reading(22), {})
    group.close()
    lost = 22 - len(sink.steps)
    assert lost >= 14
    assert sink.steps[-1] == 22
    assert sink.steps == sorted(sink.steps)
    assert sum(gap.count for gap in sink.gaps) == lost
    assert sink.gaps[0].kind == "readings"
    assert "disk full" in sink.gaps[0].reason
    again = [m for m in caplog.messages if "works again; lost meanwhile" in m]
    assert len(again) == 1
    assert f"{sink.gaps[0].count} readings of steps" in again[0]
    assert caplog.text.count("failed and is tried again") == 1


def test_a_record_that_always_fails_does_not_keep_back_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.002)

    class Picky(Kept):
        def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
            if reading.step == 2:
                raise OSError("file name too long")
            super().write_reading(reading, scalars)

    sink = Picky()
    group = SinkGroup([sink])
    group.open(None, META)
    for step in range(1, 5):
        group.write_reading(reading(step), {})
    until(lambda: len(sink.steps) == 3)
    until(lambda: len(sink.gaps) == 1)
    group.close()
    assert sink.steps == [1, 3, 4]
    assert sink.gaps == [Gap("readings", 2, 2, 1, "OSError: file name too long")]


def test_an_exit_raised_in_a_thread_is_a_failure_like_any_other(quick: None) -> None:
    sink = Kept()
    group = SinkGroup([sink])
    group.open(None, META)
    sink.error = SystemExit(3)
    group.write_reading(reading(1), {})
    until(lambda: group._deliveries[0].is_troubled)
    sink.error = None
    group.write_reading(reading(2), {})
    group.close()
    assert sink.steps == [2]


def test_a_sink_that_cannot_be_opened_for_a_while_is_opened_later(quick: None) -> None:
    class Late(Kept):
        tries = 0

        def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
            self.tries += 1
            if self.tries < 4:
                raise OSError("read-only file system")

    sink = Late()
    group = SinkGroup([sink])
    group.open(None, META)
    for step in range(1, 4):
        group.write_reading(reading(step), {})
    until(lambda: sink.steps == [1, 2, 3])
    group.close()
    assert sink.tries == 4
    assert sink.gaps == []


def test_flush_waits_for_a_slow_sink_and_not_for_a_failing_one(quick: None) -> None:
    class Slow(Kept):
        def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
            time.sleep(0.05)
            super().write_reading(reading, scalars)

    slow, failing = Slow(), Kept()
    failing.error = OSError("away")
    group = SinkGroup([slow])
    group.open(None, META)
    for step in range(1, 4):
        group.write_reading(reading(step), {})
    assert group.flush()
    assert slow.steps == [1, 2, 3]
    group.close()
    group = SinkGroup([failing])
    group.open(None, META)
    group.write_reading(reading(1), {})
    until(lambda: group._deliveries[0].is_troubled)
    begun = time.monotonic()
    assert not group.flush(5.0)
    assert time.monotonic() - begun < 1
    group.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_a_queue_of_its_own(tmp_path: Path) -> None:
    sink = JsonlSink()
    slow = Kept()
    slow.gate.clear()
    group = SinkGroup([slow, sink])
    group.open(tmp_path, META)
    group.write_reading(reading(1), {})
    child = os.fork()
    if child == 0:  # the hung sink's thread and what waits for it are the parent's
        try:
            busy = len(group._deliveries[0]._waiting)
            slow.gate.set()
            group.write_reading(reading(2), {})
            group.close()
            os._exit(0 if slow.steps == [2] and busy == 0 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    slow.gate.set()
    group.close()
    assert slow.steps == [1]


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )


EXIT = """
import os, sys, time
from pathlib import Path
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.jsonl import JsonlSink
from stabmon.sinks.delivery import delivery
from tests.support.sample_records import META, issue, reading
delivery.AT_EXIT = 1.0
class Slow(JsonlSink):
    def write_reading(self, reading, scalars):
        time.sleep(0.03)
        super().write_reading(reading, scalars)
class Hung(Sink):
    def write_reading(self, reading, scalars):
        time.sleep(3600)
group = SinkGroup([Slow(), *([Hung()] if {hung} else [])])
group.open(Path({folder!r}), META)
for step in range(1, 11):
    group.write_reading(reading(step), {{}})
begun = time.monotonic()
{end}
"""


def test_an_exit_without_close_writes_what_waits(tmp_path: Path) -> None:
    done = run_code(EXIT.format(hung=False, folder=str(tmp_path), end=""))
    assert done.returncode == 0, done.stderr
    assert [each.step for each in read_records(tmp_path).readings] == list(range(1, 11))


def test_a_hung_sink_does_not_keep_the_process(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = run_code(EXIT.format(hung=True, folder=str(tmp_path), end=""))
    assert done.returncode == 0
    assert time.monotonic() - begun < 60
    assert "10 calls wait for Hung" in done.stderr
    assert [each.step for each in read_records(tmp_path).readings] == list(range(1, 11))


def test_a_kill_loses_at_most_what_waits(tmp_path: Path) -> None:
    end = "print(len(group._deliveries[0]._waiting), flush=True); os.kill(os.getpid(), 9)"
    done = run_code(EXIT.format(hung=False, folder=str(tmp_path), end=end))
    assert done.returncode == -9
    waited = int(done.stdout)
    steps = [each.step for each in read_records(tmp_path).readings]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 10 - waited - 1, "one was being written"


def test_a_group_that_is_dropped_keeps_neither_its_thread_nor_its_sinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_IDLE", 0.05)
    sink = Kept()
    group = SinkGroup([sink])
    group.open(None, META)
    group.write_reading(reading(1), {})
    gone = weakref.ref(sink)
    del group, sink
    until(lambda: gc.collect() >= 0 and gone() is None)
    assert not [t for t in threading.enumerate() if t.name == "stabmon Kept"]


def test_closed_records_follow_those_that_waited(tmp_path: Path) -> None:
    group = SinkGroup([JsonlSink()])
    group.open(tmp_path, META)
    for step in range(1, 200):
        group.write_reading(reading(step), {})
        group.write_issues([replace(issue(step), state="closed")])
    group.close()
    records = read_records(tmp_path)
    assert len(records.readings) == len(records.issues) == 199
    assert records.meta["ended"]


def test_no_generator_moves(tmp_path: Path) -> None:
    import random

    import torch

    def states() -> Any:
        legacy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), repr(legacy), torch.get_rng_state().tolist()

    group = SinkGroup([JsonlSink(), Kept()])
    before = states()
    group.open(tmp_path, META)
    group.write_reading(reading(1), {})
    group.close()
    assert states() == before


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "stabmon")
