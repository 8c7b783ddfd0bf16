"""Dashboards of real runs, read back from their own files and held against the records."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stabmon
from stabmon.incidents import IncidentLog
from stabmon.interventions import INTERVENTIONS
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.dashboards.panels import FEW_LAYERS, LAYER_SIGNALS, MOST_PANELS, STATE
from stabmon.sinks.reader import read_records
from stabmon.sinks.scalars import dashboard_scalars
from stabmon.sinks.wandb import WandbSink
from tests.support import wandb_files
from tests.support.sample_records import META, issue
from tests.support.small_runs import batches, gpt2, optimizer_of
from tests.support.sweeps import sweep

SIGNALS = (
    "attention_entropy",
    "normalized_entropy",
    "max_logit",
    "max_probability",
    "collision_probability",
    "sink_mass",
    "softmax_jacobian_norm",
    "hnf_log_curvature",
    "hnf_log_curvature_bound",
    "precision_bits",
    "saturated_fraction",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}
    for name, value in (settings | {"DISABLE_GIT": "true", "X_DISABLE_STATS": "true"}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)


@dataclass
class Written:
    """What two dashboards got of a run, and where its records are."""

    folder: Path
    wandb_file: str

    @classmethod
    def by(cls, sink: Any, folder: Path) -> "Written":
        """The run that a W&B sink is writing to."""
        return cls(folder, sink._run.settings.sync_file)

    def table(self, name: str) -> list[dict[str, Any]]:
        return wandb_files.table(self.wandb_file, Path(self.wandb_file).parent / "files", name)

    def events(self) -> Any:
        return tensorboard_events(self.folder)

    def texts(self, name: str) -> list[str]:
        return tensorboard_texts(self.folder, name)


def tensorboard_events(folder: Path) -> Any:
    """As a page would get them: TensorBoard keeps ten texts of a tag, the newest always."""
    (found,) = folder.rglob("tensorboard")
    return EventAccumulator(str(found)).Reload()


def tensorboard_texts(folder: Path, name: str) -> list[str]:
    found = tensorboard_events(folder).Tensors(f"stability/{name}/text_summary")
    return [each.tensor_proto.string_val[0].decode() for each in found]


def issues_in(text: str) -> Counter[Any]:
    """(step, severity, state, type, layer, head) of every issue in a history."""
    found: Counter[Any] = Counter()
    line = r"^- step (\d+), \*\*(\w+)\*\*, (\w+): (\w+), (\S+)(?: heads? (.+))?$"
    for step, severity, state, name, layer, heads in re.findall(line, text, re.MULTILINE):
        place = (int(step), severity, state, name, None if layer == "run" else layer)
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", heads) or [("", "")]:
            numbers = range(int(first), int(last or first) + 1) if first else [None]
            found.update((*place, number) for number in numbers)
    return found


def key(each: StabilityIssue) -> Any:
    return (each.step, each.severity, each.state, each.issue_type, each.layer, each.head)


def test_every_issue_and_intervention_of_a_real_run_is_on_both_dashboards(
    tmp_path: Path,
) -> None:
    model, sink = gpt2(), WandbSink()
    optimizer = optimizer_of(model, 1e-3)
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, log_every=1, sinks=["jsonl", "tensorboard", sink], run_dir=tmp_path
    ) as monitor:
        for step, batch in enumerate(batches(50), start=1):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for block in model.transformer.h:
                    block.attn.c_attn.weight[:, :64] *= 1.15 if step > 16 else 1.0
            monitor.on_step(loss)
            if step == 40:
                applied = monitor.apply(INTERVENTIONS["lower_learning_rate"]())
            if step == 45:
                applied.undo()
        written = Written.by(sink, tmp_path)
    records = read_records(tmp_path)
    assert len(records.issues) > 10
    assert [each["action"] for each in records.interventions] == ["applied", "undone"]
    history = written.texts("history")[-1]
    assert issues_in(history) == Counter(map(key, records.issues))
    assert history.count("**intervention** at step") == len(records.interventions)
    names = ("step", "severity", "state", "issue_type", "layer", "head")
    assert Counter(
        tuple(row[name] for name in names) for row in written.table("stability/issues")
    ) == Counter(map(key, records.issues))
    assert [
        (row["step"], row["intervention"], row["action"])
        for row in written.table("stability/interventions")
    ] == [(each["step"], each["intervention"], each["action"]) for each in records.interventions]
    marked = {
        row["stabmon/step"]
        for row in wandb_files.rows(written.wandb_file)
        if row.get("stability/intervention") == 1
    }
    assert marked == {40, 45}
    points = written.events().Scalars("stability/intervention")
    assert {point.step for point in points if point.value == 1} == marked


def stream(layers: int, steps: int = 25, heads: int = 8) -> Iterator[list[StabilityIssue]]:
    """Issues of every step: heads collapse one after the other, worsen, and close again."""
    for step in range(1, steps + 1):
        state = ("opened", "worsened", "closed")[step % 3]
        severity = {"opened": "warning", "worsened": "error", "closed": "info"}[state]
        yield [
            issue(
                step,
                head=head,
                layer=f"h.{(step // 3) % layers}.attn",
                state=state,
                severity=severity,
                value=0.01 * step,
            )
            for head in range(step % heads + 1)
        ]


def readings_of(layers: int, step: int, heads: int = 8) -> Reading:
    rng = np.random.default_rng(step)
    measured = {name: rng.random(heads) for name in SIGNALS}
    names = [f"h.{layer}.attn" for layer in range(layers)]
    risks = dict.fromkeys(names, 1 / (1 + step))
    return Reading(step, 2.0, {name: dict(measured) for name in names}, risk=risks)


def write_run(
    folder: Path, layers: int, *, with_issues: bool, steps: int = 5, **wandb_settings: Any
) -> Written:
    """Write a run to both dashboards as the monitor does."""
    log, alarms = IncidentLog(), 0
    sink = WandbSink(**wandb_settings)
    group = SinkGroup([SINKS["tensorboard"](), sink])
    group.open(folder, META)
    for step, issues in enumerate(stream(layers, steps), start=1):
        reading = readings_of(layers, step)
        shown = issues if with_issues else []
        alarms += sum(each.is_alarm for each in shown)
        scalars = dashboard_scalars(reading, shown, alarms=alarms)
        group.write_reading(reading, scalars | {"stability/learning_rate_factor": 1.0})
        group.write_issues(shown)
        group.write_incidents(log.update(shown))
        if with_issues and step % 5 == 0:
            group.write_intervention(
                {"intervention": "qk_clip", "action": "applied", "step": step, "layer": "h.0.attn"}
            )
    written = Written.by(sink, folder)
    group.close()
    assert group.failed == {}
    return written


@pytest.mark.long
def test_issues_of_more_steps_than_tensorboard_keeps_texts_of_are_all_in_the_newest(
    tmp_path: Path,
) -> None:
    written = write_run(tmp_path, 4, with_issues=True, steps=25)
    recorded = Counter(key(each) for issues in stream(4) for each in issues)
    kept = written.texts("issues")
    assert len(kept) == 10  # of 25 steps
    assert issues_in(written.texts("history")[-1]) == recorded
    assert written.texts("history")[-1].count("**intervention** at step") == 5
    assert sum(recorded.values()) == len(written.table("stability/issues"))


@pytest.mark.parametrize("layers", sweep([32, 4], keep=1))
def test_a_healthy_run_has_few_panels_however_many_layers(tmp_path: Path, layers: int) -> None:
    written = write_run(tmp_path, layers, with_issues=False, steps=2)
    names, panels = wandb_files.panels(written.wandb_file)
    state = {f"stability/{name}" for name in STATE} - {"stability/intervention"}
    extremes = {name for name in panels if name.startswith("attention/")}
    assert panels == state | extremes | {"attention_heatmap/every_head"}
    assert len(extremes) == MOST_PANELS
    logged = {name for name in names if name.startswith("attention_layers/")}
    assert len(logged) == (layers * (len(SIGNALS) + 1) if layers <= FEW_LAYERS else 0)
    every = {f"attention/{name}/{how}" for name in SIGNALS for how in ("max", "mean", "min")}
    assert every <= names
    tags = set(written.events().Tags()["scalars"])
    assert len(tags) == len(every) + layers * (len(SIGNALS) + 1) + len(state) + 1  # and alarms


@pytest.mark.long
def test_layers_that_issues_name_get_curves_and_all_on_request(tmp_path: Path) -> None:
    names, panels = wandb_files.panels(
        write_run(tmp_path / "few", 32, with_issues=True, steps=12).wandb_file
    )
    shown = {name for name in panels if name.startswith("attention_layers/")}
    first = {f"attention_layers/h.{layer}.attn" for layer in range(FEW_LAYERS)}
    assert {name.rpartition("/")[0] for name in shown} == first
    assert {name.rpartition("/")[2] for name in shown} == set(LAYER_SIGNALS)
    assert {name.rpartition("/")[0] for name in names if "_layers/" in name} == first
    state = len(STATE) + len(("issues", "interventions"))
    assert len(panels) == state + MOST_PANELS + 1 + FEW_LAYERS * len(LAYER_SIGNALS)
    names, panels = wandb_files.panels(
        write_run(tmp_path / "all", 32, with_issues=False, steps=1, all_layers=True).wandb_file
    )
    assert sum(name.startswith("attention_layers/") for name in panels) == 32 * 12


def test_summaries_hold_extremes_and_the_configuration_what_the_run_was_watched_with(
    tmp_path: Path,
) -> None:
    written = write_run(tmp_path, 2, with_issues=True)
    summary = wandb_files.summary(written.wandb_file)
    values = [readings_of(2, step).layers["h.0.attn"]["max_logit"] for step in range(1, 6)]
    assert summary["attention/max_logit/max"] == pytest.approx(
        {"max": max(map(max, values)), "last": max(values[-1])}
    )
    assert summary["attention/normalized_entropy/min"].keys() == {"min", "last"}
    assert summary["stability/risk"]["max"] > summary["stability/risk"]["last"]
    assert wandb_files.config(written.wandb_file)["stabmon"] == META


def test_an_incident_alerts_with_cause_and_layer_and_what_to_do(tmp_path: Path) -> None:
    sink = WandbSink()
    group = SinkGroup([sink])
    group.open(None, META)
    log = IncidentLog()
    told = []
    for issues in stream(4):
        incidents = log.update(issues)
        told += [each for each in incidents if each.alerts]
        group.write_issues(issues)
        group.write_incidents(incidents)
    path = Written.by(sink, tmp_path).wandb_file
    group.close()
    alerts = wandb_files.of_kind(path, "alert")
    assert len(alerts) == len(told) > 0
    for alert, incident in zip(alerts, told, strict=True):
        assert alert.title == f"stabmon: {incident.headline}"
        assert "h." in alert.title
        assert incident.text() in alert.text
        assert incident.advice in alert.text


def test_custom_scalars_have_a_category_a_signal_with_all_heads_and_all_layers(
    tmp_path: Path,
) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    written = write_run(tmp_path, 4, with_issues=False, steps=2)
    (event,) = written.events().Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {each.title: list(each.chart) for each in layout.category}
    assert list(charts)[:3] == ["stability", "max_logit", "normalized_entropy"]
    assert charts.keys() == {"stability", *SIGNALS}
    tags = written.events().Tags()["scalars"]
    for signal in SIGNALS:
        heads, layers = charts[signal]
        (series,) = heads.margin.series
        assert (series.lower, series.value, series.upper) == tuple(
            f"attention/{signal}/{how}" for how in ("min", "mean", "max")
        )
        (pattern,) = layers.multiline.tag
        assert sum(bool(re.search(pattern, tag)) for tag in tags) == 4
    for chart in charts["stability"]:
        for pattern in chart.multiline.tag:
            found = [tag for tag in tags if re.search(pattern, tag)]
            assert found or "intervention" in pattern


def test_one_text_a_step_has_incidents_first_then_each_issue_and_the_advice_once(
    tmp_path: Path,
) -> None:
    group = SinkGroup([SINKS["tensorboard"]()])
    group.open(tmp_path, META)
    issues = [issue(10, head=head) for head in range(3)]
    (incident,) = IncidentLog().update(issues)
    group.write_issues(issues)
    group.write_incidents([incident])
    group.close()
    text = tensorboard_texts(tmp_path, "issues")[-1]
    first, *rest = text.split("\n\n")
    assert incident.text() in first
    assert first.startswith("**error**")
    assert text.count(incident.advice) == 1
    assert sum(f"head {head}," in part for part in rest for head in range(3)) == 3


def test_a_step_written_late_hides_nothing(tmp_path: Path) -> None:
    """TensorBoard drops what came after a step that it gets late."""
    group = SinkGroup([SINKS["tensorboard"]()])
    group.open(tmp_path, META)
    group.write_issues([issue(20)])
    group.write_issues([issue(10, head=3)])
    group.close()
    events = tensorboard_events(tmp_path).Tensors("stability/issues/text_summary")
    assert [event.step for event in events] == [20, 20]
    assert "head 3" in events[-1].tensor_proto.string_val[0].decode()


@pytest.mark.long
def test_the_workspace_shows_the_run_first_and_keeps_the_users_panels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stabmon.cli import main

    path = tmp_path / "view.json"
    calls = [["--project", "mine"], ["--entity", "us", "--out", str(path)]]
    for call in calls:
        monkeypatch.setattr("sys.argv", ["stabmon", "wandb-workspace", *call])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
    printed = capsys.readouterr()
    view, stored = json.loads(printed.out), json.loads(path.read_text())
    assert (view["project"], stored["entity"]) == ("mine", "us")
    assert printed.err.count("not saved") == 2
    section = stored["spec"]["section"]
    assert section["settings"]["shouldAutoGeneratePanels"] is True
    bank = section["panelBankConfig"]["sections"]
    assert bank[0]["name"] == "Stability"
    written = write_run(tmp_path / "run", 4, with_issues=True)
    names, _ = wandb_files.panels(written.wandb_file)
    for panel in (panel for each in bank for panel in each["panels"]):
        config = panel["config"]
        shown = [*config.get("metrics", ()), *config.get("mediaKeys", ())]
        assert set(shown) <= names
        if "stability" not in str(config) and (pattern := config.get("metricRegex")):
            known = [*names, "train/loss", "loss", "train/learning_rate", "lr"]
            assert any(re.search(pattern, name) for name in known)
