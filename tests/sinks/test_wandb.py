"""Offline W&B runs, read back from their own files."""

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from stabmon.incidents import IncidentLog
from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.delivery.slow_start import SlowStart
from stabmon.sinks.scalars import dashboard_scalars
from stabmon.sinks.wandb import WandbSink
from tests.support.sample_records import LAYERS, META, issue, reading
from tests.support.wandb_files import records, rows, table


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    settings = {
        "MODE": "offline",
        "DIR": str(tmp_path),
        "SILENT": "true",
        "CONSOLE": "off",
        "DISABLE_GIT": "true",
    }
    for name, value in (settings | {"X_DISABLE_STATS": "true"}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    if wandb.run is not None:
        wandb.finish()


def write(sink: Any, step: int, **changes: Any) -> None:
    sink.write_reading(
        reading(step, **changes), dashboard_scalars(reading(step, **changes), [], alarms=step)
    )


def own(sink: Any) -> Any:
    """The run of its own that a sink has made, once there was a record."""
    assert wandb.run is None
    return sink._run


def test_a_run_of_our_own_has_every_scalar_under_its_own_step_and_is_not_the_active_one() -> None:
    sink = SINKS["wandb"]()
    sink.open(None, META)
    write(sink, 10)
    path = own(sink).settings.sync_file
    assert own(sink).project == "stabmon"
    for step in (30, 20):
        write(sink, step)
    theirs = wandb.init(project="theirs")  # made late, it is a run of its own
    write(sink, 40)
    theirs.log({"loss": 1.0}, step=0)
    sink.close()
    sink.close()
    assert wandb.run is theirs
    theirs.log({"loss": 2.0}, step=1)
    theirs.finish()
    assert [row["loss"] for row in rows(theirs.settings.sync_file)] == [1.0, 2.0]
    history = rows(path)
    assert [row["stabmon/step"] for row in history] == [10, 30, 20, 40]
    for row, step in zip(history, (10, 30, 20), strict=False):
        for name, value in dashboard_scalars(reading(step), [], alarms=step).items():
            assert row[name] == pytest.approx(value)
    metrics = [
        record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"
    ]
    assert "stabmon/step" in {metric.name for metric in metrics}
    follow = {metric.glob_name for metric in metrics if metric.step_metric == "stabmon/step"}
    assert {"attention/*", "attention_layers/*", "stability/*"} <= follow
    assert not {"attention_heads/max_logit/_type", "attention_heatmap/max_logit/_type"} & set(
        history[0]
    )


def test_a_run_made_before_the_first_record_is_joined_and_left_open() -> None:
    sink = WandbSink()
    sink.open(None, META)
    theirs = wandb.init(project="theirs")
    write(sink, 10)
    theirs.log({"loss": 1.0})
    write(sink, 20)
    theirs.log({"loss": 2.0})
    sink.close()
    assert wandb.run is theirs
    path = theirs.settings.sync_file
    theirs.finish()
    assert [(row["stabmon/step"], row["loss"]) for row in rows(path)] == [(10, 1.0), (20, 2.0)]


LOGS = {
    "no step": lambda run, count, step: run.log({"loss": float(step)}),
    "its own count": lambda run, count, step: run.log({"loss": float(step)}, step=count),
    "its own count, committed": lambda run, count, step: run.log(
        {"loss": float(step)}, step=count, commit=True
    ),
    "the optimizer's step": lambda run, count, step: run.log({"loss": float(step)}, step=step),
    "in two parts": lambda run, count, step: (
        run.log({"half": 1}, step=count),
        run.log({"loss": float(step)}, step=count),
    ),
    "without commit": lambda run, count, step: (
        run.log({"loss": float(step)}, commit=False),
        run.log({"half": 1}),
    ),
}


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_whatever_steps_a_run_gives_its_rows_are_as_without_us_and_every_reading_arrives(
    log: Any,
) -> None:
    def run(watched: bool) -> tuple[list[Any], list[Any]]:
        theirs = wandb.init(project="theirs")
        sink = WandbSink()
        sink.open(None, META)
        for step in range(1, 13):
            if watched:
                write(sink, step)
            if step % 4 == 0:
                log(theirs, step // 4, step)
        sink.close()
        log(theirs, 4, 13)
        theirs.finish()
        history = rows(theirs.settings.sync_file)
        told = [row["stabmon/step"] for row in history if "stabmon/step" in row]
        return [
            {name: row.get(name) for name in ("_step", "loss", "half")}
            for row in history
            if "loss" in row
        ], told

    alone, none = run(watched=False)
    beside, told = run(watched=True)
    assert len(alone) == 4
    assert none == []
    assert beside == alone
    assert sorted(told) == list(range(1, 13))
    assert [step for step in told if step % 4 == 0] == [4, 8, 12]


def test_a_row_holds_no_value_of_a_reading_that_it_replaces() -> None:
    theirs = wandb.init(project="theirs")
    sink = WandbSink()
    sink.open(None, META)
    sink.write_reading(reading(1), {"attention/a": 1.0, "attention/b": 1.0})
    sink.write_reading(reading(2), {"attention/a": 2.0})
    theirs.log({"loss": 1.0})
    theirs.finish()
    first, last = rows(theirs.settings.sync_file)
    assert (first["stabmon/step"], first["attention/a"], first["loss"]) == (2, 2.0, 1.0)
    assert math.isnan(first["attention/b"])
    assert (last["stabmon/step"], last["attention/a"], last["attention/b"]) == (1, 1.0, 1.0)


def test_two_monitors_in_one_run_keep_each_others_readings() -> None:
    theirs = wandb.init(project="theirs")
    for step in (1, 2):
        sink = WandbSink()
        sink.open(None, META)
        write(sink, step)
        sink.close()
    theirs.finish()
    assert sorted(row["stabmon/step"] for row in rows(theirs.settings.sync_file)) == [1, 2]


def test_in_a_run_that_goes_on_later_the_readings_without_a_row_are_a_table() -> None:
    """Rows at its end would move on the step that the resumed run begins at."""
    theirs = wandb.init(project="theirs", id="goes-on", resume="allow")
    sink = WandbSink()
    sink.open(None, META)
    for step in (1, 2, 3):
        write(sink, step)
    theirs.log({"loss": 1.0}, step=0)
    sink.close()
    folder = Path(theirs.dir)
    theirs.finish()
    (row,) = rows(theirs.settings.sync_file)
    assert (row["stabmon/step"], row["_step"], row["loss"]) == (3, 0, 1.0)
    (file,) = (folder / "media" / "table" / "stability").glob("readings*.json")
    table = json.loads(file.read_text())
    assert [line[table["columns"].index("stabmon/step")] for line in table["data"]] == [1, 2]


def test_issues_in_a_run_of_somebody_elses_are_a_table_in_its_summary_and_no_row() -> None:
    theirs = wandb.init(project="theirs")
    sink = WandbSink()
    sink.open(None, META)
    sink.write_issue(issue(10))
    folder = Path(theirs.dir)
    theirs.finish()  # before we are closed
    sink.close()
    assert rows(theirs.settings.sync_file) == []
    (file,) = (folder / "media" / "table" / "stability").glob("issues*.json")
    assert json.loads(file.read_text())["data"][0][0] == 10


def test_issues_become_a_table() -> None:
    sink = WandbSink()
    sink.open(None, META)
    write(sink, 10)
    path, files = own(sink).settings.sync_file, Path(own(sink).dir)
    sink.write_issue(issue(10, severity="warning", value=float("nan")))
    sink.write_issue(issue(10, severity="critical", head=3, eta_steps=20.0))
    write(sink, 20)
    sink.write_issue(issue(20, state="closed", severity="info", layer=None, head=None))
    write(sink, 30)
    sink.close()
    history = rows(path)
    assert ["stability/issues/_type" in row for row in history] == [False, True, False, True]
    table = json.loads((files / history[-1]["stability/issues/path"]).read_text())
    assert table["columns"][:6] == ["step", "state", "severity", "issue_type", "layer", "head"]
    assert [row[:6] for row in table["data"]] == [
        [10, "opened", "warning", "entropy_collapse", LAYERS[1], 2],
        [10, "opened", "critical", "entropy_collapse", LAYERS[1], 3],
        [20, "closed", "info", "entropy_collapse", None, None],
    ]


def test_heads_come_as_histogram_and_heatmap_on_request() -> None:
    sink = WandbSink(per_head=True, image_every=2)
    sink.open(None, META)
    write(sink, 1)
    path = own(sink).settings.sync_file
    for step in (2, 3):
        write(sink, step)
    sink.close()
    history = rows(path)
    assert [row["attention_heads/max_logit/_type"] for row in history] == ["histogram"] * 3
    assert ["attention_heatmap/max_logit/_type" in row for row in history] == [True, False, True]
    assert (
        history[0]["attention_heatmap/max_logit/width"]
        == 2 * history[0]["attention_heatmap/max_logit/height"]
    )
    assert "0.001 (dark)" in history[0]["attention_heatmap/attention_entropy/caption"]


def test_interventions_in_a_run_of_somebody_elses_ride_on_the_row_of_their_step() -> None:
    theirs = wandb.init(project="theirs")
    sink = WandbSink()
    sink.open(None, META)
    record = {"intervention": "qk_clip", "layer": LAYERS[0], "head": 1}
    for step in (10, 20, 30):
        write(sink, step)
        if step == 20:
            sink.write_intervention(record | {"action": "applied", "step": step})
        theirs.log({"loss": 1.0})
    sink.write_intervention(record | {"action": "refused", "step": 30, "why": "it does not fit"})
    files, path = Path(theirs.dir), theirs.settings.sync_file
    sink.close()
    theirs.finish()
    history = rows(path)
    assert [row["stabmon/step"] for row in history] == [10, 20, 30]
    assert [row.get("stability/intervention") for row in history] == [None, 1, 0]
    told = table(path, files, "stability/interventions")
    assert [(row["step"], row["action"]) for row in told] == [(20, "applied"), (30, "refused")]
    assert "qk_clip" in told[0]["in words"]


def test_the_configuration_of_a_run_of_somebody_elses_gets_an_entry_that_follows_ours() -> None:
    theirs = wandb.init(project="theirs", config={"lr": 0.1})
    sink = WandbSink()
    sink.open(None, META)
    write(sink, 10)
    sink.amend({"layers": {LAYERS[0]: 4}})
    sink.close()
    assert theirs.config["stabmon"] == {**META, "layers": {LAYERS[0]: 4}}
    assert theirs.config["lr"] == 0.1


def test_one_image_of_every_head_comes_untouched_and_at_an_alarm() -> None:
    sink = WandbSink()
    sink.open(None, META)
    write(sink, 10)
    path = own(sink).settings.sync_file
    write(sink, 20)
    sink.write_incidents(IncidentLog().update([issue(20)]))
    write(sink, 30)
    sink.close()
    assert [
        row["stabmon/step"] for row in rows(path) if "attention_heatmap/every_head/_type" in row
    ] == [10, 20]


def test_a_run_too_short_for_its_pictures_gets_one_at_its_end() -> None:
    sink = WandbSink(image_every=4)
    sink.open(None, META)
    for step in range(1, 9):
        write(sink, step)
        path = own(sink).settings.sync_file
    sink.close()
    drawn = [
        row["stabmon/step"] for row in rows(path) if "attention_heatmap/every_head/_type" in row
    ]
    assert drawn == [1, 8]


def test_a_run_that_was_finished_under_us_stops_this_sink_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb.init(project="theirs")
    group = SinkGroup([WandbSink()])
    group.open(None, META)
    write(group, 10)
    wandb.finish()
    for step in range(20, 80, 10):
        write(group, step)
    group.close()
    assert "was finished while training went on" in group.failed["WandbSink"]
    assert len([record for record in caplog.records if record.name == "stabmon"]) == 2


def test_an_init_that_hangs_stalls_one_record_and_loses_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release, init = threading.Event(), wandb.init

    def hangs(**options: Any) -> Any:
        release.wait(30)
        return init(**options)

    monkeypatch.setattr(wandb, "init", hangs)
    monkeypatch.setattr(SlowStart.__init__, "__defaults__", (0.3,))
    sink = SINKS["wandb"]()
    group = SinkGroup([sink])
    group.open(None, META)
    began = time.monotonic()
    for step in (10, 20, 30):
        group.write_reading(reading(step), {})
    assert time.monotonic() - began < 5
    assert caplog.text.count("wandb.init has not returned within 0.3 s") == 1
    release.set()
    until = time.monotonic() + 20
    while sink._run is None and time.monotonic() < until:
        time.sleep(0.2)
        group.write_reading(reading(40), {})
    path = own(sink).settings.sync_file
    group.close()
    steps = [row["stabmon/step"] for row in rows(path) if "stabmon/step" in row]
    assert [step for step in steps if step < 40] == [10, 20, 30]
