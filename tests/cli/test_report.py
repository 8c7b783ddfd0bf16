"""The command ``stabmon report``: pages, findings, and refusals in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.cli.test_cli import run
from tests.support.stored_runs import grow, train_into


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder above a healthy and, newer, a damaged run."""
    root = tmp_path_factory.mktemp("runs")
    train_into(root / "healthy", 3, report=False)
    train_into(root / "damaged", 60, between=grow, report=False)
    os.utime(root / "healthy" / "stabmon" / "readings.jsonl", (1, 1))
    return root


def test_a_healthy_run_leaves_a_page_beside_its_records(runs: Path) -> None:
    done = run("report", str(runs / "healthy"))
    page = runs / "healthy" / "stabmon" / "report.html"
    assert (done.returncode, done.stderr) == (0, "")
    assert "Healthy: 3 samples over 3 steps, no alarm." in done.stdout
    assert "<strong>Healthy: 3 samples" in page.read_text("utf-8")


def test_a_damaged_run_is_a_finding_and_json_is_alone_on_standard_output(
    runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "page.html"
    done = run("report", str(runs / "damaged"), "--out", str(out), "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["schema_version"], found["page"]) == (1, str(out))
    (one,) = found["runs"]
    assert (one["verdict"]["level"], one["state"], one["last_step"]) == ("damaged", "ended", 60)
    assert one["incidents"][0]["state"] == "open"
    assert out.is_file()


def test_a_folder_above_runs_gives_the_newest_and_names_all(runs: Path, tmp_path: Path) -> None:
    done = run("report", str(runs), "--out", str(tmp_path / "page.html"))
    assert done.returncode == 1
    assert "holds 2 runs, newest first: damaged, healthy. Taken:" in done.stderr
    only = tmp_path / "only"
    shutil.copytree(runs / "healthy", only / "deep" / "healthy")
    done = run("report", str(only), "--out", str(tmp_path / "page.html"))
    assert (done.returncode, "holds one run" in done.stderr) == (0, True)


def test_several_runs_go_on_one_page(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(runs / "healthy"), str(runs / "damaged#1")]
    assert run("report", *names).returncode == 1
    assert "2 runs compared" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder; give the output folder of a run"),
        (["{empty}"], "holds no stabmon records; give the run folder that holds stabmon/"),
        (["{file}"], "is a file; give the output folder of a run"),
        (["{runs}/healthy#2"], "#2: the folder holds 1 run, counted from 1"),
        (["{runs}/healthy", "--out", "{empty}"], "is a folder; name a file in it"),
        (["{runs}/healthy", "--out", "{file}/page.html"], "is a file; name a folder"),
        (["{runs}/healthy", "--fail-on", "info"], "--fail-on 'info': use warning or error"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], said: str, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    names = {"runs": runs, "empty": tmp_path / "empty", "file": tmp_path / "file"}
    done = run("report", *(each.format(**names) for each in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
