"""The group that isolates sinks, and what all sinks have in common."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from stabmon.records import Reading
from stabmon.sinks import SINKS, Sink, SinkGroup
from stabmon.sinks.console import ConsoleSink
from stabmon.sinks.mlflow import MlflowSink
from stabmon.sinks.tensorboard import TensorboardSink
from stabmon.sinks.wandb import WandbSink

from .samples import META, issue, reading


class Broken(Sink):
    """Fails when it is written to, and again when it is closed."""

    closed = 0

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        raise ConnectionError("no route to host")

    def close(self) -> None:
        self.closed += 1
        raise ConnectionError("still no route")


class Counting(Sink):
    """Counts what it is given."""

    def __init__(self) -> None:
        self.readings = 0
        self.records: list[Any] = []

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self.readings += 1

    def write_issue(self, issue: Any) -> None:
        self.records.append(issue)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)


def test_a_failing_sink_is_reported_once_let_go_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    broken, healthy = Broken(), Counting()
    group = SinkGroup([broken, healthy])
    group.open(None, META)
    for step in (1, 2, 3):
        group.write_reading(reading(step), {})
    group.write_issue(issue(3))
    group.write_intervention({"step": 3})
    group.close()
    group.close()
    assert healthy.readings == 3
    assert len(healthy.records) == 2
    assert broken.closed == 1
    assert group.failed == {"Broken": "ConnectionError: no route to host"}
    assert [record.getMessage() for record in caplog.records] == [
        "Broken stopped and is left out: ConnectionError: no route to host. Training and the other sinks go on."
    ]


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Sink):
        def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SinkGroup([Interrupted()]).write_reading(reading(1), {})


def test_every_sink_is_known_by_name_and_needs_no_argument() -> None:
    assert set(SINKS) >= {"console", "jsonl", "mlflow", "tensorboard", "wandb"}
    for _, cls in SINKS.items():
        assert isinstance(cls(), Sink)
        assert cls.__doc__


@pytest.mark.parametrize("name", ["console", "jsonl", "mlflow", "tensorboard", "wandb"])
def test_a_sink_that_was_never_opened_can_be_closed(name: str) -> None:
    sink = SINKS[name]()
    sink.close()
    sink.close()


def test_listing_the_sinks_imports_no_logging_package() -> None:
    code = (
        "import sys; from stabmon.sinks import SINKS; list(SINKS); print({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(("sink", "package"), [(WandbSink, "wandb"), (MlflowSink, "mlflow"), (TensorboardSink, "tensorboard")])
def test_a_missing_package_names_its_extra(sink: type[Sink], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith((f"{package}.", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    group = SinkGroup([sink(), ConsoleSink()])
    group.open(None, META)
    assert group.failed[sink.__name__] == f'ImportError: {package} is not installed: pip install "stabmon[{package}]"'
    assert len(group.sinks) == 1
