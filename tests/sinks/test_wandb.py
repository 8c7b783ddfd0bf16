"""Offline W&B runs, read back from their own files."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars
from stabmon.sinks.wandb import WandbSink

from .samples import LAYERS, META, issue, reading


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}
    for name, value in (settings | {"X_DISABLE_STATS": "true"}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    if wandb.run is not None:
        wandb.finish()


def records(path: str) -> list[Any]:
    """Every record of a finished run's .wandb file; W&B may still be writing its end when ``finish`` returns."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = list(parse(Path(path).read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{path} has no end")


def parse(data: bytes) -> Iterator[Any]:
    """W&B's own protocol buffers in a LevelDB log: blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    place, payload = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(payload)
            payload = b""
            yield record


def rows(path: str) -> list[dict[str, Any]]:
    """The run's history, one dict a row."""
    found = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in found]


def write(sink: Any, step: int, **changes: Any) -> None:
    sink.write_reading(reading(step, **changes), dashboard_scalars(reading(step, **changes), [], alarms=step))


def test_a_run_of_our_own_has_every_scalar_under_its_own_step() -> None:
    sink = SINKS["wandb"]()
    sink.open(None, META)
    path = wandb.run.settings.sync_file
    assert wandb.run.project == "stabmon"
    for step in (10, 30, 20):
        write(sink, step)
    sink.close()
    sink.close()
    assert wandb.run is None
    history = rows(path)
    assert [row["stabmon/step"] for row in history] == [10, 30, 20]
    for row, step in zip(history, (10, 30, 20), strict=True):
        for name, value in dashboard_scalars(reading(step), [], alarms=step).items():
            assert row[name] == pytest.approx(value)
    metrics = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    assert "stabmon/step" in {metric.name for metric in metrics}
    follow = {metric.glob_name for metric in metrics if metric.step_metric == "stabmon/step"}
    assert {"attention/*", "attention_layers/*", "stability/*"} <= follow
    assert not {"attention_heads/max_logit/_type", "attention_heatmap/max_logit/_type"} & set(history[0])


def test_an_active_run_is_joined_and_left_open() -> None:
    theirs = wandb.init(project="theirs")
    sink = WandbSink()
    sink.open(None, META)
    write(sink, 10)
    theirs.log({"loss": 1.0})
    write(sink, 20)
    theirs.log({"loss": 2.0})
    sink.close()
    assert wandb.run is theirs
    path = theirs.settings.sync_file
    theirs.finish()
    assert [(row["stabmon/step"], row["loss"]) for row in rows(path)] == [(10, 1.0), (20, 2.0)]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_a_loop_that_counts_its_own_steps_loses_no_row_and_neither_do_we(ours_first: bool, first: int) -> None:
    theirs = wandb.init(project="theirs")
    sink = WandbSink()
    sink.open(None, META)
    for step in range(first, first + 6):
        if ours_first:
            write(sink, step)
        theirs.log({"loss": float(step)}, step=step)
        if not ours_first:
            write(sink, step)
    sink.close()
    path = theirs.settings.sync_file
    theirs.finish()
    history = rows(path)
    assert [row["loss"] for row in history if "loss" in row] == [float(step) for step in range(first, first + 6)]
    assert [row["stabmon/step"] for row in history if "stabmon/step" in row] == list(range(first, first + 6))


def test_readings_with_no_log_between_them_do_not_overwrite_each_other() -> None:
    theirs = wandb.init(project="theirs")
    sink = WandbSink()
    sink.open(None, META)
    for step in (10, 20, 30):
        write(sink, step)
    theirs.log({"loss": 1.0}, step=100)
    path = theirs.settings.sync_file
    sink.close()
    theirs.finish()
    history = rows(path)
    assert [row["stabmon/step"] for row in history if "stabmon/step" in row] == [10, 20, 30]
    assert history[-1]["loss"] == 1.0


def test_issues_become_a_table_and_alarms_an_alert() -> None:
    sink = WandbSink()
    sink.open(None, META)
    path, files = wandb.run.settings.sync_file, Path(wandb.run.dir)
    write(sink, 10)
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
    alerts = [record.alert for record in records(path) if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.level) for alert in alerts] == [("stabmon: entropy_collapse", "ERROR")]
    assert f"{LAYERS[1]} head 3" in alerts[0].text


def test_heads_come_as_histogram_and_heatmap_on_request() -> None:
    sink = WandbSink(per_head=True, image_every=2)
    sink.open(None, META)
    path = wandb.run.settings.sync_file
    for step in (1, 2, 3):
        write(sink, step)
    sink.close()
    history = rows(path)
    assert [row["attention_heads/max_logit/_type"] for row in history] == ["histogram"] * 3
    assert ["attention_heatmap/max_logit/_type" in row for row in history] == [True, False, True]
    assert history[0]["attention_heatmap/max_logit/width"] == 2 * history[0]["attention_heatmap/max_logit/height"]
    assert "0.001 (dark)" in history[0]["attention_heatmap/attention_entropy/caption"]


def test_a_run_that_was_finished_under_us_stops_this_sink_alone(caplog: pytest.LogCaptureFixture) -> None:
    wandb.init(project="theirs")
    group = SinkGroup([WandbSink()])
    group.open(None, META)
    wandb.finish()
    write(group, 10)
    write(group, 20)
    group.close()
    assert "WandbSink" in group.failed
    assert len([record for record in caplog.records if record.name == "stabmon"]) == 1
