"""Check when a run's records are opened, written and closed, and what a failing sink does."""

from pathlib import Path

import pytest

from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.recording.recorder import Recorder
from stabmon.sinks import Sink
from stabmon.sinks.jsonl import JsonlSink
from tests.support.sample_records import META, issue, reading
from tests.support.small_runs import lines


class ListSink(Sink):
    """Keeps every call; fails at one kind of them."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple] = []
        self.fails = fails

    def _keep(self, kind: str, *what: object) -> None:
        if kind == self.fails:
            raise OSError(f"no {kind}")
        self.calls.append((kind, *what))

    def open(self, run_dir, meta) -> None:
        self._keep("open", run_dir, dict(meta))

    def amend(self, meta) -> None:
        self._keep("amend", dict(meta))

    def write_reading(self, reading, scalars) -> None:
        self._keep("reading", reading.step, dict(scalars))

    def write_issue(self, issue) -> None:
        self._keep("issue", issue.step)

    def write_intervention(self, record) -> None:
        self._keep("intervention", record["step"])

    def close(self) -> None:
        self._keep("close")

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.calls]


def make(*sinks: Sink, folder: Path | None = None) -> Recorder:
    recorder = Recorder(sinks, folder, ErrorBoundary())
    recorder.set_meta(lambda: META)
    return recorder


def test_a_run_without_a_step_leaves_nothing(tmp_path: Path) -> None:
    asked = []
    sink = ListSink()
    recorder = Recorder([sink], tmp_path / "run", ErrorBoundary())
    recorder.set_meta(lambda: asked.append(1) or META)
    recorder.close()
    recorder.open_sinks()  # comes too late
    assert sink.kinds == ["close"]
    assert not asked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda recorder: recorder.open_sinks(),
        lambda recorder: recorder.write_reading(reading(1), []),
        lambda recorder: recorder.write_issues([issue(1)]),
        lambda recorder: recorder.write_intervention({"step": 1}),
    ],
    ids=["begin", "reading", "issue", "intervention"],
)
def test_the_first_record_opens_the_sinks_once(write, tmp_path: Path) -> None:
    sink = ListSink()
    recorder = make(sink, folder=tmp_path / "run")
    write(recorder)
    recorder.open_sinks()
    write(recorder)
    assert sink.calls[0] == ("open", tmp_path / "run", META)
    assert sink.kinds.count("open") == 1
    assert (tmp_path / "run").is_dir()


def test_without_a_sink_no_folder_is_made(tmp_path: Path) -> None:
    recorder = make(folder=tmp_path / "run")
    recorder.write_reading(reading(1), [])
    assert not (tmp_path / "run").exists()


def test_issues_are_kept_with_the_number_of_alarms_and_not_written() -> None:
    sink = ListSink()
    recorder = make(sink)
    kept = [issue(1), issue(2, severity="warning"), issue(3, severity="critical")]
    recorder.keep(kept[:2])
    recorder.keep(kept[2:])
    assert recorder.issues == kept
    assert recorder.alarms == 2
    assert not sink.calls


def test_a_reading_is_written_with_the_dashboards_scalars() -> None:
    sink = ListSink()
    recorder = make(sink)
    recorder.keep([issue(1)])
    recorder.write_reading(reading(2), [issue(1)], overhead=0.25)
    kind, step, scalars = sink.calls[-1]
    assert (kind, step) == ("reading", 2)
    assert scalars["stability/overhead"] == 0.25
    recorder.keep([issue(3)])
    recorder.write_reading(reading(4), [])
    changed = {name for name, value in sink.calls[-1][2].items() if value != scalars.get(name)}
    counted = {name for name in changed if scalars.get(name) == 1 and sink.calls[-1][2][name] == 2}
    assert len(counted) == 1  # the number of alarms so far


def test_a_sink_that_fails_is_counted_once_and_the_others_go_on(tmp_path: Path) -> None:
    broken, whole = ListSink(fails="reading"), JsonlSink()
    recorder = make(broken, whole, folder=tmp_path)
    for step in (1, 2):
        recorder.write_reading(reading(step), [])
    assert recorder.boundary.errors == {"sink": 1}
    recorder.write_intervention({"step": 2})
    recorder.close()
    assert [each["step"] for each in lines(tmp_path / "readings.jsonl")] == [1, 2]
    assert [each["step"] for each in lines(tmp_path / "interventions.jsonl")] == [2]


def test_a_folder_that_cannot_be_made_is_an_error_and_sinks_open_without_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = ListSink()
    recorder = make(sink, folder=tmp_path / "file" / "run")
    recorder.write_issues([issue(1)])
    assert recorder.boundary.errors == {"make_folder": 1}
    assert sink.calls == [("open", None, META), ("issue", 1)]


def test_what_becomes_known_later_reaches_the_sinks() -> None:
    sink = ListSink()
    recorder = make(sink)
    recorder.open_sinks()
    recorder.amend({"heads": 4})
    recorder.close()
    assert sink.calls[1:] == [("amend", {"heads": 4}), ("close",)]
