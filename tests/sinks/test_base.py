"""The group that isolates sinks, and what all sinks have in common."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from stabmon.records import Reading
from stabmon.sinks import SINKS, Sink, SinkGroup
from stabmon.sinks.console import ConsoleSink
from stabmon.sinks.jsonl import JsonlSink
from stabmon.sinks.mlflow import MlflowSink
from stabmon.sinks.tensorboard import TensorboardSink
from stabmon.sinks.wandb import WandbSink
from tests.support.sample_records import META, issue, reading


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


def test_a_sink_that_keeps_failing_hinders_nothing_and_says_what_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, healthy = Broken(), Counting()
    group = SinkGroup([broken, healthy])
    group.open(None, META)
    for step in range(1, 8):
        group.write_reading(reading(step), {})
    group.write_issue(issue(3))
    group.write_intervention({"step": 3})
    assert group.sinks == [broken, healthy], "it is tried again for ever"
    group.close()
    group.close()
    assert healthy.readings == 7
    assert len(healthy.records) == 2
    assert broken.closed == 1
    assert group.failed == {"Broken": "ConnectionError: still no route"}
    assert [record.getMessage() for record in caplog.records] == [
        "stabmon: Broken failed and is tried again: ConnectionError: no route to host. Training goes on.",
        "stabmon: Broken did not write everything. 7 records are lost: 7 readings of steps 1 to 7.",
    ]


class Moody(Counting):
    """Fails with a given error while it is in a mood."""

    error: Exception | None = None

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        if self.error is not None:
            raise self.error
        self.records.append(reading.step)


def test_a_sink_that_fails_for_a_while_gets_what_it_missed_in_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Moody()
    group = SinkGroup([sink])
    group.open(None, META)
    for step, error in enumerate(
        [None, OSError("disk full"), OSError("disk full"), None, OSError("disk full"), None],
        start=1,
    ):
        sink.error = error
        group.write_reading(reading(step), {})
    group.close()
    assert sink.records == [1, 2, 3, 4, 5, 6]
    assert group.failed == {}
    assert group.troubled == {"Moody"}
    assert caplog.text.count("disk full") == len(caplog.records) == 1


def test_a_record_that_cannot_be_written_is_counted_and_does_not_keep_back_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Moody()
    group = SinkGroup([sink])
    group.open(None, META)
    for step, error in enumerate([None, TypeError("odd"), None], start=1):
        sink.error = error
        group.write_reading(reading(step), {})
    group.close()
    assert sink.records == [1, 3]
    assert caplog.messages[-1] == (
        "stabmon: Moody did not write everything. 1 record is lost: 1 reading of step 2."
    )


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Sink):
        in_background = False

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
        "import sys; from stabmon.sinks import SINKS; list(SINKS); print({'wandb', 'mlflow', "
        "'tensorboard'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("sink", "package"),
    [(WandbSink, "wandb"), (MlflowSink, "mlflow"), (TensorboardSink, "tensorboard")],
)
def test_a_missing_package_names_its_extra(
    sink: type[Sink], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.startswith((f"{package}.", "torch.utils.tensorboard"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    group = SinkGroup([sink(), ConsoleSink()])
    group.open(None, META)
    assert (
        group.failed[sink.__name__]
        == f'ImportError: {package} is not installed: pip install "stabmon[{package}]"'
    )
    assert len(group.sinks) == 1


def test_a_group_amends_the_metadata_of_its_sinks(tmp_path):
    group = SinkGroup([JsonlSink()])
    group.open(tmp_path, {"a": 1})
    group.amend({"b": 2})
    group.close()
    assert {"a": 1, "b": 2}.items() <= json.loads((tmp_path / "meta.json").read_text()).items()
    assert group.troubled == set()
