"""Every reporter of the Trainer and every logger of Lightning gets the scalars.

Trackers that are not installed are skipped; Kubeflow needs no package, and the CSV logger comes
with Lightning.
"""

import csv
import json
import random
import sqlite3
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, integration_utils

from stabmon.integrations.lightning import StabilityCallback as LightningCallback
from stabmon.integrations.transformers import StabilityCallback
from tests.integrations.test_lightning import Module, fit
from tests.integrations.test_transformers import readings, trainer_of
from tests.support.small_runs import gpt2, same_bits, weights
from tests.support.sweeps import sweep

pytestmark = pytest.mark.filterwarnings("ignore")
LOGS = {"logging_strategy": "steps", "logging_steps": 2}
NAME, OF_A_LAYER = "attention/max_logit/max", "attention_layers/transformer.h.1.attn/max_logit"


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


def draw():
    """Draw from every global random generator."""
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)


def largest(callback):
    """The largest score by step, as the readings have it."""
    return {
        each.step: max(signals["max_logit"].max() for signals in each.layers.values())
        for each in readings(callback)
    }


def train_with(tmp_path, *reporters, callback=True, more=(), **options):
    """Train 8 steps, sampled at 4 and 8, and give the callback and the trainer."""
    given = {"log_every": 4, "schedule": "fixed"} | options
    made = StabilityCallback("observe", **given) if callback else None
    trainer = trainer_of(tmp_path, made, gpt2(0.1), more=more, report_to=list(reporters), **LOGS)
    trainer.train()
    assert made is None or not made.monitor.errors
    return made, trainer


class Table(TrainerCallback):
    """A reporter of another package, which at our scalars does what it should not."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        assert model is not None
        self.rows.append((state.global_step, dict(logs)))
        if "stability/risk" in logs:
            draw()
            state.global_step = 0
            control.should_training_stop = True
            logs.clear()


@pytest.fixture
def table(monkeypatch):
    """Make :class:`Table` what ``report_to=["table"]`` names."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "table", Table)


def test_a_reporter_gets_the_scalars_at_their_step_and_training_is_as_without(
    tmp_path, table, capsys
):
    ends, rows = [], []
    for used in (False, True):
        callback, trainer = train_with(tmp_path / str(used), "table", callback=used)
        (reporter,) = (
            each for each in trainer.callback_handler.callbacks if isinstance(each, Table)
        )
        ends.append(weights(trainer.model))
        rows.append(reporter.rows)
    ours = {step: logs for step, logs in rows[1] if NAME in logs}
    assert {step: logs[NAME] for step, logs in ours.items()} == pytest.approx(largest(callback))
    assert OF_A_LAYER in ours[8]
    losses = [[(step, logs["loss"]) for step, logs in each if "loss" in logs] for each in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert same_bits(*ends)
    assert NAME not in capsys.readouterr().out
    history = [each for each in trainer.state.log_history if NAME in each]
    assert [each["step"] for each in history] == [4, 8]


def test_a_reporter_that_fails_is_named_once_and_the_others_go_on(
    tmp_path, table, monkeypatch, caplog
):
    class Broken(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if NAME in logs:
                raise RuntimeError("planted")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "broken", Broken)
    callback = StabilityCallback("observe", log_every=1)
    trainer = trainer_of(tmp_path, callback, report_to=["broken", "table"])
    trainer.train()
    (reporter,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Table))
    assert len([logs for _, logs in reporter.rows if NAME in logs]) == 8
    assert callback.monitor.errors == {"sink": 1}
    assert caplog.text.count("stabmon: Broken failed and is tried again") == 1


def test_of_many_layers_a_reporter_gets_those_that_issues_name_and_all_on_request(tmp_path, table):
    found = []
    for per_head in (None, True):
        callback = StabilityCallback("observe", log_every=1, per_head=per_head)
        model = gpt2(n_layer=6)
        with torch.no_grad():  # a NaN in one layer
            model.transformer.h[3].attn.c_attn.weight[0, 0] = float("nan")
        trainer = trainer_of(
            tmp_path / str(per_head), callback, model, report_to=["table"], max_steps=2
        )
        trainer.train()
        (reporter,) = (
            each for each in trainer.callback_handler.callbacks if isinstance(each, Table)
        )
        rows = [logs for _, logs in reporter.rows if "stability/risk" in logs]
        found.append(
            [{name.split("/")[1] for name in logs if "attention_layers" in name} for logs in rows]
        )
        assert callback.issues
    few, every = found
    assert len(few) == len(every) == 2
    assert few[0] == set()
    assert all(len(layers) == 6 for layers in every)


def test_callbacks_that_print_or_listen_get_nothing(tmp_path):
    seen = []

    class Listens(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    train_with(tmp_path, more=[Listens()])
    assert seen
    assert not [logs for logs in seen if NAME in logs]


def test_sinks_of_ones_own_leave_the_reporters_out(tmp_path, table):
    _, trainer = train_with(tmp_path, "table", sinks=["jsonl"])
    (reporter,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Table))
    assert not [logs for _, logs in reporter.rows if NAME in logs]


def test_kubeflow_gets_the_scalars_of_the_model_beside_those_of_the_trainer(tmp_path, monkeypatch):
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("token")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    callback, _ = train_with(tmp_path / "run", "kubeflow")
    server.shutdown()
    server.server_close()
    last = {each["name"]: each["value"] for each in bodies[-1]["trainerStatus"]["metrics"]}
    assert float(last[NAME]) == pytest.approx(largest(callback)[8])
    assert "loss" in last
    assert not [name for name in last if name.startswith("attention_layers")]


def tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags()


@pytest.mark.parametrize("per_head", sweep([None, True], keep=1))
def test_every_head_reaches_the_dashboards_of_both_frameworks_on_request(
    tmp_path, per_head, monkeypatch
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "hf"))
    callback = StabilityCallback("observe", log_every=4, per_head=per_head)
    trainer_of(tmp_path / "out", callback, report_to=["tensorboard"]).train()
    module_callback = LightningCallback("observe", log_every=4, per_head=per_head)
    logger = TensorBoardLogger(tmp_path, "pl", "v")
    fit(tmp_path, Module(), module_callback, logger=logger)
    for folder in (tmp_path / "hf", tmp_path / "pl" / "v"):
        tags = tensorboard_tags(folder)
        assert NAME in tags["scalars"]
        assert ("attention_heads/max_logit" in tags["histograms"]) == bool(per_head)


def test_a_tensorboard_reporter_that_is_added_later_gets_the_scalars(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = StabilityCallback("observe", log_every=4)
    trainer = trainer_of(tmp_path / "out", callback)
    trainer.add_callback(TensorBoardCallback())
    trainer.train()
    assert f"train/{NAME}" in tensorboard_tags(tmp_path / "events")["scalars"]


class Own(Logger):
    """A logger that somebody wrote."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "own", 0

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))
        if NAME in metrics:
            draw()
            metrics.clear()


class Board(TensorBoardLogger):
    """A subclass of a logger that has a sink of its own."""


def test_lightnings_loggers_get_the_scalars_and_training_is_as_without(tmp_path):
    ends = []
    for used in (False, True):
        callback = LightningCallback("observe", log_every=4) if used else None
        loggers = [CSVLogger(tmp_path, "table", str(used)), Own(), Board(tmp_path, "board", "v")]
        module = Module(dropout=0.1)
        fit(tmp_path, module, callback, logger=loggers)
        ends.append(weights(module))
    assert same_bits(*ends)
    layer = "attention_layers/model.transformer.h.1.attn/max_logit"
    ours = {step: row for step, row in loggers[1].rows if NAME in row}
    assert {step: row[NAME] for step, row in ours.items()} == pytest.approx(largest(callback))
    assert layer in ours[8]
    with open(tmp_path / "table" / "True" / "metrics.csv") as file:
        table = {int(row["step"]): row for row in csv.DictReader(file) if row.get(NAME)}
    assert {step: float(row[NAME]) for step, row in table.items()} == pytest.approx(
        largest(callback)
    )
    assert table[8][layer]
    assert NAME in tensorboard_tags(tmp_path / "board" / "v")["scalars"]
    assert not callback.monitor.errors


# -- trackers of other packages, offline


@needs("dvclive")
def test_dvclive_has_the_scalars_and_the_trainers_rows_keep_their_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback, _ = train_with(tmp_path / "out", "dvclive")
    folder = tmp_path / "dvclive" / "plots" / "metrics"

    def column(name):
        rows = list(csv.DictReader((folder / f"{name}.tsv").open(), delimiter="\t"))
        return [int(row["step"]) for row in rows], [float(list(row.values())[-1]) for row in rows]

    assert column("grad_norm")[0] == [0, 1, 2, 3]
    assert column(NAME)[1] == pytest.approx(list(largest(callback).values()))
    assert column("stability/step")[1] == [4, 8]


@needs("trackio")
def test_trackio_has_the_scalars_and_the_trainers_rows_keep_their_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    callback, _ = train_with(tmp_path / "out", "trackio")
    rows = []
    for file in (tmp_path / "trackio").rglob("*.db"):
        with sqlite3.connect(file) as base:
            rows += base.execute("select step, metrics from metrics").fetchall()
    rows = [(step, json.loads(metrics)) for step, metrics in rows]
    assert [step for step, row in rows if "train/loss" in row] == [0, 1, 2, 3]
    ours = {row["train/global_step"]: row for _, row in rows if f"train/{NAME}" in row}
    assert {step: row[f"train/{NAME}"] for step, row in ours.items()} == pytest.approx(
        largest(callback)
    )


@needs("comet_ml")
def test_comet_has_the_scalars(tmp_path, monkeypatch):
    for name, value in {
        "COMET_API_KEY": "x",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"),
    }.items():
        monkeypatch.setenv(name, value)
    import comet_ml

    callback, _ = train_with(tmp_path / "out", "comet_ml")
    comet_ml.get_running_experiment().end()
    (archive,) = (tmp_path / "comet").glob("*.zip")
    messages = zipfile.ZipFile(archive).read("messages.json").decode().splitlines()
    metrics = [
        each["payload"]["metric"]
        for each in map(json.loads, messages)
        if each["type"] == "metric_msg"
    ]
    ours = {
        each["step"]: each["metricValue"]
        for each in metrics
        if each["metricName"] == f"train/{NAME}"
    }
    assert ours == pytest.approx(largest(callback))


@needs("aim")
def test_aim_has_the_scalars(tmp_path):
    import aim
    from aim.hugging_face import AimCallback

    reporter = AimCallback(
        str(tmp_path),
        log_system_params=False,
        capture_terminal_logs=False,
        system_tracking_interval=None,
    )
    callback, _ = train_with(tmp_path / "out", more=[reporter])
    found = aim.Run(reporter._run_hash, repo=str(tmp_path)).collect_sequence_info(("metric",))
    (ours,) = (each["values"] for each in found["metric"] if each["name"] == NAME)
    assert {
        ours["first_step"]: ours["first"],
        ours["last_step"]: ours["last"],
    } == pytest.approx(largest(callback))
