"""``stabmon watch`` as a user types it."""

import json
import os
from pathlib import Path

import pytest

from stabmon.sinks.reader import read_records
from tests.cli.test_cli import run
from tests.support.written_records import collapse, opened, store, wide_reading


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs in folders of their own, the second one newer."""
    for name, step in (("old", 10), ("deep/new", 70)):
        store(tmp_path / name / "stabmon", (step,)).close()
    os.utime(tmp_path / "old" / "stabmon" / "readings.jsonl", (1, 1))
    return tmp_path


def test_the_newest_run_below_a_folder_is_shown(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "stabmon new · step 70" in run("watch", str(runs), "--once").stdout
    assert "stabmon old · step 10" in run("watch", str(runs / "old"), "--once").stdout
    assert "stabmon old · step 10" in run("watch", str(runs / "old" / "stabmon")).stdout
    monkeypatch.chdir(runs)
    assert "stabmon new · step 70" in run("watch").stdout


def test_output_into_a_pipe_is_plain_text(runs: Path) -> None:
    said = run("watch", str(runs), "--once").stdout
    assert "\x1b" not in said
    assert "h.3.attn" in said


def test_json_holds_every_run_of_the_folder(tmp_path: Path) -> None:
    sink = store(tmp_path, (10, 20))
    sink.write_issue(collapse(20))
    sink.close()
    sink = opened(tmp_path)
    sink.write_reading(wide_reading(10, loss=float("nan")), {})
    sink.write_issue(collapse(10, head=2, severity="warning"))
    sink.write_intervention({"intervention": "stop", "action": "applied", "step": 10})
    sink.close()
    records = read_records(tmp_path)
    values = json.loads(run("watch", str(tmp_path), "--json").stdout)
    assert (values["run"], values["step"], values["readings"]) == (2, 10, len(records.readings))
    assert (values["loss"], values["nonfinite"]) == (None, {"/loss": "nan"})
    assert [each["step"] for each in values["issues"]] == [20, 10]
    assert [each["number"] for each in values["incidents"]] == [1]
    assert [each["step"] for each in values["interventions"]] == [10]
    assert 0 <= values["seconds_since_reading"] < 600


def test_an_alarm_of_any_run_in_the_folder_is_a_finding(tmp_path: Path) -> None:
    sink = store(tmp_path, (10,))
    sink.write_issue(collapse(10))
    sink.close()
    store(tmp_path, (10,)).close()
    assert run("watch", str(tmp_path), "--once").returncode == 1


@pytest.mark.parametrize("flag", ["--once", "--json"])
def test_without_records_the_place_and_the_mend_are_named(tmp_path: Path, flag: str) -> None:
    done = run("watch", str(tmp_path), flag)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "first optimizer step" in done.stderr
    assert len(done.stderr.splitlines()) == 1
