"""The newest reading and the loss line, against all records read."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from stabmon.sinks.jsonl import READINGS
from stabmon.sinks.reader import read_records
from stabmon.sinks.stored import readings_tail
from stabmon.sinks.stored.readings_tail import ReadingsTail, count_readings
from tests.support.written_records import opened, store, wide_reading


def points(tail: ReadingsTail) -> list[tuple[int, float | None]]:
    return [(point.step, point.loss) for point in tail.points]


def expected(folder: Path) -> list[tuple[int, float | None]]:
    newest = read_records(folder).runs[-1]
    return [(reading.step, reading.loss) for reading in newest.readings]


def histories(folder: Path) -> None:
    """A run, one that began anew, resumed twice from an earlier step, the last time longer ago."""
    store(folder, range(10, 60, 10)).close()
    store(folder, range(10, 90, 10)).close()
    for first, last in ((50, 120), (40, 70)):
        sink = opened(folder, continues=True)
        for step in range(first, last, 10):
            sink.write_reading(wide_reading(step, loss=step / 7), {})
        sink.close()


@pytest.mark.parametrize("at_once", [True, False])
def test_runs_and_starts_are_those_of_all_records(tmp_path: Path, at_once: bool) -> None:
    tail = ReadingsTail(tmp_path / READINGS)
    if at_once:
        histories(tmp_path)
        tail.look()
    else:
        histories(tmp_path)
        text = (tmp_path / READINGS).read_bytes()
        (tmp_path / READINGS).write_bytes(b"")
        with (tmp_path / READINGS).open("ab", buffering=0) as file:
            for start in range(0, len(text), 777):
                file.write(text[start : start + 777])
                tail.look()
    assert points(tail) == expected(tmp_path)
    assert [(each.run, each.start, each.first_step) for each in tail.starts] == [
        (1, 1, 10),
        (2, 2, 10),
        (2, 3, 50),
        (2, 4, 40),
    ]
    assert tail.newest is not None
    assert (tail.newest.step, tail.run) == (60, 2)
    assert count_readings(tmp_path / READINGS) == len(read_records(tmp_path).readings)


def test_of_a_large_file_lines_evenly_apart_and_the_ends_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings_tail, "WHOLE_BYTES", 10_000)
    histories(tmp_path)
    sink = opened(tmp_path, continues=True)
    for step in range(70, 4000, 10):
        sink.write_reading(wide_reading(step), {})
    sink.close()
    tail = ReadingsTail(tmp_path / READINGS)
    tail.look()
    every = dict(expected(tmp_path))
    steps = [point.step for point in tail.points]
    assert set(points(tail)) <= set(every.items())
    assert (steps[0], steps[-1]) == (10, 3990)
    assert readings_tail.SAMPLES <= len(steps) < len(every)
    assert max(np.diff(steps)) <= 4 * len(every) * 10 / readings_tail.SAMPLES


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_a_look_reads_what_is_new_and_no_more(tmp_path: Path) -> None:
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    sink = store(tmp_path, range(10, 1010, 10), layers=16, heads=16)
    size = (tmp_path / READINGS).stat().st_size
    assert size > 500_000
    tail = ReadingsTail(tmp_path / READINGS)
    tail.look()
    sink.write_reading(wide_reading(1010, layers=16, heads=16), {})
    grown = (tmp_path / READINGS).stat().st_size - size
    before = read()
    assert tail.look()
    assert read() - before < grown + 200_000
    before = read()
    assert not tail.look()
    assert read() - before < 100_000
    sink.close()


def test_a_layer_is_followed_over_the_steps(tmp_path: Path) -> None:
    store(tmp_path, range(10, 510, 10)).close()
    tail = ReadingsTail(tmp_path / READINGS)
    tail.look()
    found = dict(tail.layer_history("h.0.attn", most=20))
    assert len(found) <= 21
    assert {10, 500} <= set(found)
    for step, signals in found.items():
        np.testing.assert_array_equal(
            signals["normalized_entropy"], np.full(4, float(f"{1 / step:.8g}"))
        )


def test_corrupt_lines_are_passed_over(tmp_path: Path) -> None:
    store(tmp_path, (10, 20)).close()
    with (tmp_path / READINGS).open("ab") as file:
        file.write(b"\x00\x00\n{}\n")
    tail = ReadingsTail(tmp_path / READINGS)
    tail.look()
    assert points(tail) == [(10, 1.0), (20, 0.5)]
    assert tail.newest is not None
    with (tmp_path / READINGS).open("ab") as file:
        file.write(b"nothing\n")
    tail.look()
    assert tail.newest.step == 20


def test_a_layer_is_followed_past_a_damaged_line(tmp_path: Path) -> None:
    store(tmp_path, (10, 20, 30)).close()
    tail = ReadingsTail(tmp_path / READINGS)
    tail.look()
    layer = next(iter(tail.newest.layers))
    text = (tmp_path / READINGS).read_bytes()
    at = text.index(b'"step": 20')
    start = text.index(b'"normalized_entropy": [', at) + 23
    (tmp_path / READINGS).write_bytes(text[:start] + b"[" + text[start + 1 :])
    assert [step for step, _ in tail.layer_history(layer)] == [10, 30]


def test_points_are_thinned_and_not_finite_losses_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings_tail, "MOST_POINTS", 20)
    sink, tail = opened(tmp_path), ReadingsTail(tmp_path / READINGS)
    for step in range(1, 101):
        sink.write_reading(wide_reading(step, loss=math.nan if step > 95 else step), {})
        tail.look()
    sink.close()
    assert len(tail.points) <= 21
    assert (tail.points[0].step, tail.points[-1].step) == (1, 100)
    assert math.isnan(tail.points[-1].loss or 0.0)


def test_a_file_that_was_replaced_is_looked_at_anew(tmp_path: Path) -> None:
    store(tmp_path / "old", range(10, 50, 10)).close()
    store(tmp_path / "new", range(5, 100, 5)).close()
    tail = ReadingsTail(tmp_path / "old" / READINGS)
    tail.look()
    os.replace(tmp_path / "new" / READINGS, tmp_path / "old" / READINGS)
    assert tail.look()
    assert [step for step, _ in points(tail)] == list(range(5, 100, 5))
