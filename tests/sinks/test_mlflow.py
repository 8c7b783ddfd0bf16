"""MLflow runs in a local store, read back by MLflow's client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.mlflow import MlflowSink
from stabmon.sinks.scalars import dashboard_scalars
from tests.support.sample_records import META, issue, reading


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    mlflow.set_tracking_uri(f"file:{tmp_path / 'runs'}")
    yield mlflow.MlflowClient()
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


def write(sink: Any, *steps: int) -> None:
    for step in steps:
        sink.write_reading(reading(step), dashboard_scalars(reading(step), [], alarms=step))


def only_run(client: Any, experiment: str) -> Any:
    """The one run of an experiment."""
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_a_run_of_our_own_holds_every_scalar_at_its_step(client: Any) -> None:
    sink = SINKS["mlflow"]()
    sink.open(None, META)
    assert mlflow.active_run() is None
    write(sink, 10, 20)
    sink.close()
    sink.close()
    run = only_run(client, "stabmon")
    assert run.info.status == "FINISHED"
    expected = dashboard_scalars(reading(20), [], alarms=20)
    assert run.data.metrics == pytest.approx(expected)
    assert [
        point.step
        for point in client.get_metric_history(run.info.run_id, "attention/max_logit/max")
    ] == [10, 20]


def test_an_active_run_is_joined_and_left_running(client: Any) -> None:
    with mlflow.start_run() as theirs:
        sink = MlflowSink()
        sink.open(None, META)
        write(sink, 10)
        sink.close()
        assert client.get_run(theirs.info.run_id).info.status == "RUNNING"
    assert "stability/alarms" in client.get_run(theirs.info.run_id).data.metrics
    assert client.get_experiment_by_name("stabmon") is None


def test_issues_are_an_artifact_and_their_numbers_are_tags(client: Any) -> None:
    sink = MlflowSink(experiment="mine")
    sink.open(None, META)
    sink.write_issue(issue(10, severity="warning", value=float("inf")))
    write(sink, 10)
    sink.write_issue(issue(20, state="worsened"))
    sink.write_issue(issue(30, state="closed", severity="info"))
    write(sink, 30)
    sink.close()
    run = only_run(client, "mine")
    assert (run.data.tags["stabmon.issues"], run.data.tags["stabmon.alarms"]) == ("1", "1")
    stored = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/stabmon/issues.json"))
    assert [entry["state"] for entry in stored["issues"]] == ["opened", "worsened", "closed"]
    assert stored["nonfinite"] == {"/issues/0/value": "inf"}


def test_interventions_are_an_artifact_a_tag_and_a_marker_on_the_charts(client: Any) -> None:
    sink = MlflowSink()
    sink.open(None, META)
    write(sink, 10)
    for action, step in (("applied", 12), ("refused", 15)):
        sink.write_intervention({"intervention": "qk_clip", "action": action, "step": step})
    write(sink, 20)
    sink.close()
    run = only_run(client, "stabmon")
    assert run.data.tags["stabmon.interventions"] == "1"
    found = client.get_metric_history(run.info.run_id, "stability/intervention")
    assert [(point.step, point.value) for point in found] == [(12, 1.0), (20, 0.0)]
    artifact = f"{run.info.artifact_uri}/stabmon/interventions.json"
    stored = json.loads(mlflow.artifacts.load_text(artifact))["interventions"]
    assert [each["text"] for each in stored] == ["applied qk_clip", "could not apply qk_clip"]


def test_many_layers_and_odd_names_go_through(client: Any) -> None:
    sink = MlflowSink()
    sink.open(None, META)
    sink.write_reading(
        reading(1), {f"attention_layers/encoder.{i}#1/max_logit": float(i) for i in range(1500)}
    )
    sink.close()
    metrics = only_run(client, "stabmon").data.metrics
    assert len(metrics) == 1500
    assert metrics["attention_layers/encoder.1499_1/max_logit"] == 1499.0


def test_a_store_that_cannot_be_used_is_named_with_the_mend(tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"unheard-of://{tmp_path}")
    group = SinkGroup([MlflowSink()])
    group.open(None, META)
    write(group, 1)
    assert "set MLFLOW_TRACKING_URI to a server" in group.failed["MlflowSink"]
    assert "\n" not in group.failed["MlflowSink"]


def test_an_error_in_the_background_is_said_with_what_it_cost(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    group = SinkGroup([MlflowSink()])
    group.open(None, META)
    client.delete_run(only_run(client, "stabmon").info.run_id)
    write(group, 10, 20)
    group.close()
    assert "MlflowSink" in group.troubled
    first, last = [record.getMessage() for record in caplog.records if record.name == "stabmon"]
    assert "failed and is tried again" in first
    assert "lost" in last
