"""The command as a user types it: what it prints, and its exit status."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import stabmon
from stabmon.cli import COMMANDS, main
from stabmon.records import LayerInfo, Reading, StabilityIssue
from stabmon.sinks.jsonl import JsonlSink


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command, in this process: what it prints and how it leaves."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["stabmon", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        main()
    return subprocess.CompletedProcess(
        args, int(left.value.code or 0), out.getvalue(), err.getvalue()
    )


def run_alone(*args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    code = "from stabmon.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Records of one reading and no issue."""
    folder = tmp_path / "stabmon"
    folder.mkdir()
    sink = JsonlSink()
    sink.open(folder, {})
    layers = {"model.0.attn": {"max_logit": np.array([1.5, 7.25])}}
    sink.write_reading(
        Reading(10, 2.5, layers, {"model.0.attn": LayerInfo(2, 8, 0.35, "float32")}), {}
    )
    sink.close()
    return tmp_path


def issue(severity: str) -> StabilityIssue:
    return StabilityIssue(10, "model.0.attn", 1, "logit_growth", severity, 7.25, 3.0, "clip it")  # type: ignore[arg-type]


def add(run_dir: Path, one: StabilityIssue) -> None:
    sink = JsonlSink()
    sink.open(run_dir / "stabmon", {})
    sink.write_issue(one)
    sink.close()


def test_list_names_everything_registered() -> None:
    from stabmon.analysis.kv_cache import POLICIES
    from stabmon.controllers import CONTROLLERS
    from stabmon.interventions import INTERVENTIONS
    from stabmon.rules import RULES
    from stabmon.signals import SIGNALS
    from stabmon.sinks import SINKS

    listed = json.loads(run_alone("list", "--json").stdout)
    assert {kind: set(entries) for kind, entries in listed.items()} == {
        "signals": set(SIGNALS),
        "rules": set(RULES),
        "interventions": set(INTERVENTIONS),
        "controllers": set(CONTROLLERS),
        "sinks": set(SINKS),
        "evictions": set(POLICIES),
    }
    assert all(line for entries in listed.values() for line in entries.values())


def test_alone_it_prints_its_help() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^  {name} .*[^.]$", done.stdout, flags=re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_version_is_the_installed_one() -> None:
    assert run("--version").stdout == f"stabmon {stabmon.__version__}\n"


@pytest.mark.parametrize("command", [[], *([each] for each in COMMANDS)])
def test_help_loads_no_library_for_work(command: list[str]) -> None:
    code = """
import atexit, sys
from stabmon.cli import main
heavy = {"torch", "numpy", "transformers", "rich", "yaml", "matplotlib", "jinja2", "textual"}
atexit.register(lambda: print(sorted(heavy & sys.modules.keys()), file=sys.stderr))
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in ``stabmon list | head -1``."""
    code = "from stabmon.cli import main; main()"
    command = [sys.executable, "-c", code, "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_list_prints_one_plain_line_an_entry_at_80_columns() -> None:
    listed = json.loads(run("list", "--json").stdout)
    lines = run("list").stdout.splitlines()
    entries = [line for line in lines if line.startswith("  ")]
    assert len(entries) == sum(map(len, listed.values()))
    assert [line for line in lines if line and line not in entries] == [*listed]
    assert max(map(len, lines)) <= 80
    assert not re.search(r"[\\`$]|:math:", "".join(entries))
    assert run("list", "sinks").stdout.startswith("sinks\n  console ")


def test_watch_shows_the_newest_reading_and_leaves_with_0(run_dir: Path) -> None:
    done = run("watch", str(run_dir), "--once")
    assert done.returncode == 0
    assert "step 10 · loss 2.5" in done.stdout
    assert "7.25" in done.stdout
    assert "no incident up to step 10" in done.stdout


def test_a_terminal_without_unicode_gets_other_signs_and_no_error(run_dir: Path) -> None:
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    with (
        patch.object(sys, "argv", ["stabmon", "report", str(run_dir)]),
        patch.object(sys, "stdout", terminal),
        pytest.raises(SystemExit) as left,
    ):
        main()
    terminal.flush()
    assert left.value.code == 0
    assert re.match(rb"\S+ \? Healthy: ", written.getvalue())


def test_watch_leaves_with_1_on_an_alarm_and_names_its_place(run_dir: Path) -> None:
    add(run_dir, issue("error"))
    done = run("watch", str(run_dir), "--once")
    assert done.returncode == 1
    assert "model.0.attn head 1" in " ".join(done.stdout.split())


def test_a_warning_is_a_finding_only_on_request(run_dir: Path) -> None:
    add(run_dir, issue("warning"))
    assert run("watch", str(run_dir), "--once").returncode == 0
    assert run("watch", str(run_dir), "--once", "--fail-on", "warning").returncode == 1


def test_json_is_one_object_and_nothing_else(run_dir: Path) -> None:
    add(run_dir, issue("warning"))
    printed = json.loads(run("watch", str(run_dir), "--json").stdout)
    assert printed["step"] == 10
    assert printed["issues"][0]["issue_type"] == "logit_growth"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["list", "rulez"], "unknown kind 'rulez'"),
        (["watch", "/nowhere/at/all"], "no stabmon records"),
        (["watch", "--every", "0"], "0.1"),
        (["watch", ".", "--fail-on", "panic"], "use warning or error"),
        (["bogus"], "no command 'bogus'; use check, "),
        (["check"], "Missing argument 'model'; see stabmon check --help"),
        (["wandb-workspace", "--out", "/proc/view"], "--out /proc/view: cannot be written"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_status_2(args: list[str], says: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
