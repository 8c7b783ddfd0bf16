"""Records on disk: their shape, their exactness, and what survives a kill, a full disk and a
resume.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabmon._storage.file_lock import try_lock
from stabmon._storage.strict_json import dumps, loads
from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.delivery.gaps import Gap
from stabmon.sinks.jsonl import JsonlSink
from stabmon.sinks.reader import read_records
from stabmon.sinks.stored.layer_share import LayerShare
from tests.support.sample_records import LAYERS, META, issue, non_finite, reading, same, stored

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "stabmon"
    path.mkdir(parents=True)
    return path


def write(folder: Path, *records: object) -> None:
    """One start of a run that writes these records."""
    sink = JsonlSink()
    sink.open(folder, META)
    for record in records:
        if isinstance(record, dict):
            sink.write_intervention(record)
        elif hasattr(record, "issue_type"):
            sink.write_issue(record)  # type: ignore[arg-type]
        else:
            sink.write_reading(record, {})  # type: ignore[arg-type]
    sink.close()
    sink.close()


def test_a_line_has_the_shape_of_the_contract(folder: Path) -> None:
    write(folder, reading(10), issue(10), {"step": 10, "intervention": "lower_learning_rate"})
    line = json.loads((folder / "readings.jsonl").read_text())
    assert list(line) == [
        *("schema_version", "step", "loss", "layers", "learning_rate", "gradients", "query_key"),
        *("losses", "micro_batches", "non_finite", "overhead_fraction", "learning_rates"),
        *("rate_factors", "overshoot", "risk", "updates", "weight_decays", "parts"),
        *("query_key_groups", "rank_losses", "info", "run", "start"),
    ]
    assert line["schema_version"] == 1
    assert line["layers"][LAYERS[1]]["attention_entropy"] == [1.01, 1.11, 1.21, 1.31]
    assert "nonfinite" not in line
    line = json.loads((folder / "issues.jsonl").read_text())
    assert line["schema_version"] == 1
    assert issue(10).to_dict().items() <= line.items()
    assert (
        json.loads((folder / "interventions.jsonl").read_text())["intervention"]
        == "lower_learning_rate"
    )
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["config"] == META["config"]
    assert "nonfinite" in meta["nonfinite_encoding"]


def test_records_come_back_as_they_were(folder: Path) -> None:
    readings = [
        reading(10),
        reading(
            20, non_finite=non_finite(20), loss=None, learning_rate=None, overhead_fraction=None
        ),
    ]
    issues = [issue(10), issue(20, head=None, layer=None, eta_steps=30.0, state="worsened")]
    write(folder, *readings, *issues, {"step": 20, "factor": 0.5})
    for path in (folder, folder.parent, str(folder.parent)):
        records = read_records(path)
        assert all(
            same(back, stored(given))
            for back, given in zip(records.readings, readings, strict=True)
        )
        assert list(records.issues) == issues
        assert records.interventions == ({"step": 20, "factor": 0.5},)
        assert records.meta["versions"] == META["versions"]
        assert records.skipped == ()
        assert records.folder == folder


def test_nan_and_infinity_are_null_beside_a_field_that_says_which(folder: Path) -> None:
    odd = reading(
        10, loss=NAN, layers={"h/0~a.b": {"max_logit": np.array([1.0, INF, -INF, NAN])}}, info={}
    )
    write(folder, odd, issue(10, value=INF, evidence={"history": [1.0, NAN]}))
    text = (folder / "readings.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["layers"]["h/0~a.b"]["max_logit"] == [1.0, None, None, None]
    assert line["nonfinite"] == {
        "/loss": "nan",
        "/layers/h~10~0a.b/max_logit/1": "inf",
        "/layers/h~10~0a.b/max_logit/2": "-inf",
        "/layers/h~10~0a.b/max_logit/3": "nan",
    }
    records = read_records(folder)
    assert same(records.readings[0], stored(odd))
    assert math.isnan(records.readings[0].loss or 0.0)
    assert records.issues[0].value == INF
    assert math.isnan(records.issues[0].evidence["history"][1])


KEYS: st.SearchStrategy[str] = st.text(max_size=6).filter(lambda key: key != "nonfinite")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats(allow_nan=True, allow_infinity=True),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_record_survives_the_way_to_json_and_back(record: dict[str, Any]) -> None:
    line = dumps(record)
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert repr(loads(line)) == repr(record)


@given(st.lists(st.floats(width=64) | st.floats(width=16), max_size=20))
@settings(max_examples=100, deadline=None)
def test_arrays_survive_bit_for_bit(values: list[float]) -> None:
    array = np.array(values, dtype=np.float64)
    back = np.array(loads(dumps({"a": array}))["a"], dtype=np.float64)
    assert np.array_equal(back, array, equal_nan=True)
    assert np.array_equal(np.signbit(back[array == 0]), np.signbit(array[array == 0]))


def test_numpy_values_paths_and_tuples_become_plain() -> None:
    record: dict[Any, Any] = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "b": np.bool_(True),
        "p": Path("a") / "b",
        "t": (1, 2),
        3: np.arange(2),
    }
    assert loads(dumps(record)) == {
        "n": 3,
        "x": 0.5,
        "b": True,
        "p": "a/b",
        "t": [1, 2],
        "3": [0, 1],
    }


def test_a_killed_run_leaves_every_complete_line_readable(folder: Path) -> None:
    code = f"""
from pathlib import Path
from stabmon.sinks.jsonl import JsonlSink
from tests.support.sample_records import META, issue, reading
sink = JsonlSink()
sink.open(Path({str(folder)!r}), META)
step = 0
while True:
    step += 1
    sink.write_reading(reading(step, heads=2000), {{}})
    sink.write_issue(issue(step))
    print(step, flush=True)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, cwd=Path(__file__).parents[2]
    ) as run:
        assert run.stdout is not None
        written = 0
        while written < 20:
            written = int(run.stdout.readline())
        time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        written = int(([str(written).encode(), *run.stdout.read().split(b"\n")[:-1]])[-1])
    records = read_records(folder)
    assert len(records.readings) >= written
    assert [r.step for r in records.readings] == list(range(1, len(records.readings) + 1))
    assert all(same(r, stored(reading(r.step, heads=2000))) for r in records.readings[-3:])
    assert len(records.issues) >= written


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_cut_off_on_resume_and_nothing_else(folder: Path, cut: int) -> None:
    write(folder, reading(10), reading(20))
    path = folder / "readings.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    write(folder, reading(30))
    for line in path.read_text().splitlines():
        json.loads(line)
    whole = (
        [10, 20, 30] if cut == 1 else [10, 30]
    )  # without its newline alone, the line is complete
    assert [r.step for r in read_records(folder).readings] == whole


def test_a_file_that_is_one_torn_line_starts_afresh(folder: Path) -> None:
    (folder / "readings.jsonl").write_bytes(b'{"schema_version": 1, "step": 1' + b" " * 200_000)
    write(folder, reading(30))
    assert [r.step for r in read_records(folder).readings] == [30]


def test_a_line_being_written_is_passed_over_without_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, reading(10), reading(20))
    path = folder / "readings.jsonl"
    path.write_bytes(path.read_bytes()[:-50])
    records = read_records(folder)
    assert [r.step for r in records.readings] == [10]
    assert len(records.skipped) == 1
    assert not caplog.records


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        "[1, 2]",
        '{"step": 1}',
        '{"schema_version": 2, "step": 1}',
        '{"schema_version": 1, "step": 1, "layers": 3}',
        '{"schema_version": 1, "nonfinite": {"/a/b": "nan"}}',
        "\x00" * 40,
    ],
)
def test_a_corrupt_line_is_skipped_with_its_file_and_number(
    folder: Path, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    write(folder, reading(10))
    with (folder / "readings.jsonl").open("a") as file:
        file.write(line + "\n")
    write(folder, reading(20))
    records = read_records(folder)
    assert [r.step for r in records.readings] == [10, 20]
    assert [text.split(":")[0] for text in records.skipped] == ["readings.jsonl line 2"]
    assert "readings.jsonl line 2" in caplog.text


def test_a_resume_from_an_earlier_step_appends_and_wins_from_there_on(folder: Path) -> None:
    audit = [{"step": step} for step in (10, 30)]
    write(folder, reading(10), reading(20), issue(20), reading(30), issue(30), *audit)
    before = (folder / "readings.jsonl").read_bytes()
    write(folder, reading(20, loss=1.0), issue(20, head=0))
    assert (folder / "readings.jsonl").read_bytes().startswith(before)
    records = read_records(folder)
    assert [(r.step, r.loss) for r in records.readings] == [(10, 3.99), (20, 1.0)]
    assert [(i.step, i.head) for i in records.issues] == [(20, 0)]
    assert records.interventions == ({"step": 10},)
    assert records.meta["start"] == 2


def test_a_resume_that_has_measured_nothing_yet_hides_nothing(folder: Path) -> None:
    write(folder, reading(10), issue(10))
    write(folder)
    records = read_records(folder)
    assert [r.step for r in records.readings] == [10]
    assert len(records.issues) == 1


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            ValueError,
            match=r"no stabmon records in .*: give the run folder that holds "
            r"stabmon/readings.jsonl",
        ):
            read_records(path)


def test_broken_meta_is_reported_and_the_readings_still_come(folder: Path) -> None:
    write(folder, reading(10))
    (folder / "meta.json").write_text("{")
    records = read_records(folder)
    assert records.meta == {}
    assert len(records.readings) == 1
    assert records.skipped[0].startswith("meta.json")
    write(folder, reading(20))
    assert len(read_records(folder).readings) == 2


def test_without_a_run_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = SINKS["jsonl"]()
    sink.open(None, META)
    sink.write_reading(reading(1), {})
    sink.write_issue(issue(1))
    sink.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a device that is always full")
def test_a_full_disk_is_said_once_with_what_it_cost_and_hinders_nothing_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "readings.jsonl").symlink_to("/dev/full")
    group = SinkGroup([JsonlSink()])
    with caplog.at_level(logging.WARNING, "stabmon"):
        group.open(folder, META)
        for step in range(3):
            group.write_reading(reading(step), {})
        group.close()
    assert "No space left on device" in group.failed["JsonlSink"]
    assert caplog.text.count("No space left on device") == 1
    assert caplog.messages[-1] == (
        "stabmon: JsonlSink did not write everything. 3 records are lost: 3 readings of steps 0 to 2."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_disk_that_was_full_for_a_while_costs_no_record_and_leaves_no_torn_line(
    folder: Path,
) -> None:
    import resource

    group = SinkGroup([JsonlSink()])
    group.open(folder, META)
    group.write_reading(reading(1), {})
    size = (folder / "readings.jsonl").stat().st_size
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (size + 100, limits[1])
        )  # the next line fits in part
        group.write_reading(reading(2), {})
        group.write_reading(reading(3), {})
        assert size < (folder / "readings.jsonl").stat().st_size <= size + 100
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    group.write_reading(reading(4), {})
    group.close()
    assert group.failed == {}
    records = read_records(folder)
    assert [each.step for each in records.readings] == [1, 2, 3, 4]
    assert records.skipped == ()


def test_a_run_that_begins_anew_in_the_same_folder_stands_beside_the_first(folder: Path) -> None:
    for run, steps in ((1, (10, 20, 30)), (2, (10, 20))):
        sink = SINKS["jsonl"]()
        sink.open(folder, META | {"continues": False})
        for step in steps:
            sink.write_reading(reading(step, loss=float(run)), {})
        sink.write_issue(issue(20, head=run))
        sink.close()
    resumed = SINKS["jsonl"]()
    resumed.open(folder, META | {"continues": True})
    resumed.write_reading(reading(20, loss=3.0), {})
    resumed.close()
    records = read_records(folder)
    assert [(each.step, each.loss) for each in records.readings] == [
        (10, 1.0),
        (20, 1.0),
        (30, 1.0),
        (10, 2.0),
        (20, 3.0),
    ]
    assert [each.head for each in records.issues] == [1]
    assert [[each.step for each in run.readings] for run in records.runs] == [
        [10, 20, 30],
        [10, 20],
    ]
    assert records.meta["run"] == 2
    assert [(each["start"], each["run"]) for each in records.meta["starts"]] == [
        (1, 1),
        (2, 2),
        (3, 2),
    ]


def test_two_monitors_that_write_to_one_folder_are_two_runs_and_the_second_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (JsonlSink() for _ in range(3))
    first.open(folder, META | {"continues": False})
    first.write_reading(reading(10, loss=1.0), {})
    assert caplog.messages == []
    second.open(folder, META | {"continues": False})
    first.amend({"layers": {"first": 4}})  # meta.json is the second's by now
    second.amend({"layers": {"second": 8}})
    for step in (10, 20):
        second.write_reading(reading(step, loss=2.0), {})
        first.write_reading(reading(step + 10, loss=1.0), {})
    first.close()
    second.close()
    (said,) = caplog.messages
    assert said.startswith(f"stabmon: another monitor has {folder} open at this moment")
    assert "are run 2 there" in said
    records = read_records(folder)
    assert [[(each.step, each.loss) for each in run.readings] for run in records.runs] == [
        [(10, 1.0), (20, 1.0), (30, 1.0)],
        [(10, 2.0), (20, 2.0)],
    ]
    assert (records.meta["start"], records.meta["layers"]) == (2, {"second": 8})
    third.open(folder, META | {"continues": False})
    third.close()
    assert read_records(folder).meta["run"] == 3
    assert len(caplog.messages) == 1


STARTS = """
import sys
from pathlib import Path
from stabmon.sinks.jsonl import JsonlSink
from tests.support.sample_records import META, reading
sink = JsonlSink()
print("ready", flush=True)
sys.stdin.readline()
sink.open(Path(sys.argv[1]), META | {"continues": False})
for step in range(1, 51):
    sink.write_reading(reading(step), {})
sink.close()
"""


@pytest.mark.long
def test_processes_that_start_in_one_folder_at_the_same_time_have_runs_of_their_own(
    folder: Path,
) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STARTS, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(4)
    ]
    for each in started:
        assert each.stdout is not None
        each.stdout.readline()
    for each in started:
        each.communicate(b"\n", timeout=120)
    records = read_records(folder)
    assert records.skipped == ()
    assert [[each.step for each in run.readings] for run in records.runs] == [
        list(range(1, 51))
    ] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_was_forked_meanwhile_does_not_keep_the_folder_open(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = JsonlSink()
    sink.open(folder, META)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.close(write)
        os.read(read, 1)  # holds the files until the parent lets it go
        os._exit(0)
    sink.close()
    again = JsonlSink()
    again.open(folder, META)
    again.close()
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)
    assert caplog.messages == []


def test_a_deleted_folder_is_noticed(folder: Path) -> None:
    group = SinkGroup([JsonlSink()])
    group.open(folder, META)
    group.write_reading(reading(1), {})
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    group.write_reading(reading(2), {})
    group.close()
    assert "was deleted while the run was writing" in group.failed["JsonlSink"]


def test_a_record_that_fails_leaves_no_file_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    group = SinkGroup([JsonlSink()])
    group.open(folder, META)
    group.write_reading(reading(1, layers=None), {})
    group.write_issue(None)  # type: ignore[arg-type]
    group.close()
    assert "JsonlSink" in group.troubled
    assert len(os.listdir("/proc/self/fd")) == before


def test_numbers_of_readings_have_eight_digits_and_issues_all_of_theirs(folder: Path) -> None:
    write(folder, reading(10, loss=2 / 3), issue(10, value=2 / 3))
    line = json.loads((folder / "readings.jsonl").read_text())
    assert line["loss"] == 0.66666667
    assert json.loads((folder / "issues.jsonl").read_text())["value"] == 2 / 3


def test_a_line_is_bounded_and_layers_take_turns_but_for_those_in_trouble(
    folder: Path,
) -> None:
    sink = JsonlSink()
    sink._share = LayerShare(most_values=8)  # a layer has 4
    names = [f"h.{at}" for at in range(6)]
    sink.open(folder, META)
    for step in range(1, 8):
        layers = {name: {"max_logit": np.full(4, float(step))} for name in names}
        sink.write_reading(reading(step, layers=layers, info={}), {})
        if step == 4:
            sink.write_issues([issue(4, layer="h.5")])
    sink.close()
    lines = [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]
    assert [list(line["layers"]) for line in lines] == [
        *(["h.0", "h.1"], ["h.2", "h.3"], ["h.4", "h.5"], ["h.0", "h.1"]),
        ["h.0", "h.1", "h.5"],  # step 4 again, with the layer of its issue
        *(["h.2", "h.5"], ["h.3", "h.5"], ["h.4", "h.5"]),
    ]
    assert [line["layers_left_out"] for line in lines] == [4, 4, 4, 4, 3, 4, 4, 4]
    found = read_records(folder).readings
    assert [each.step for each in found] == list(range(1, 8))
    assert list(found[3].layers) == ["h.0", "h.1", "h.5"]
    records = read_records(folder)
    assert records.layers_left_out == {1: 4, 2: 4, 3: 4, 4: 3, 5: 4, 6: 4, 7: 4}
    assert records.layers_left_out == records.runs[0].layers_left_out
    assert "layers take turns in 7 readings" in repr(records)


def test_old_readings_are_thinned_and_steps_with_issues_stay(folder: Path) -> None:
    sink = JsonlSink(most_bytes=60_000)
    sink.open(folder, META)
    for step in range(1, 301):
        sink.write_reading(reading(step), {})
        if step in (7, 8, 9):
            sink.write_issues([issue(step)])
    size = (folder / "readings.jsonl").stat().st_size
    other = try_lock(os.open(folder / "readings.jsonl", os.O_RDWR))
    sink.close()
    steps = [each.step for each in read_records(folder).readings]
    assert size <= 62_000
    assert steps == sorted(steps)
    assert {1, 7, 8, 9, 300} <= set(steps)
    assert steps[-40:] == list(range(261, 301))
    assert np.diff(steps[5:20]).mean() > np.diff(steps[-60:-40]).mean() >= 1
    assert read_records(folder).readings[1].info.keys() == set(LAYERS)
    assert not other, "the fresh file is not locked"
    assert len(read_records(folder).issues) == 3


def test_a_gap_is_a_line_that_the_reader_returns(folder: Path) -> None:
    sink = JsonlSink()
    sink.open(folder, META)
    sink.write_reading(reading(10), {})
    gap = Gap("readings", 12, 18, 3, "OSError: no space left on device")
    sink.write_gap(gap)
    sink.close()
    records = read_records(folder)
    assert records.gaps == records.runs[0].gaps == (gap,)
    assert records.skipped == ()
