"""What the terminal shows."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from tqdm import tqdm  # type: ignore[import-untyped]

from stabmon.incidents import Incident, incidents_of
from stabmon.sinks import SINKS
from stabmon.sinks.console import ConsoleSink
from tests.support.sample_records import LAYERS, META, issue, reading

SCALARS = {
    "attention/max_logit/max": 12.0,
    "attention/normalized_entropy/min": 0.25,
    "stability/issues_open": 1.0,
}


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")


def opened(**changes: Any) -> list[Incident]:
    """The incidents of one issue."""
    return incidents_of([issue(30, **changes)])


def test_a_healthy_run_is_two_lines(tmp_path: Path) -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file)
    sink.open(tmp_path / "one" / "stabmon", META)
    for step in (10, 20, 30):
        sink.write_reading(reading(step), SCALARS)
        sink.amend({"layers": {"h.0": 4, "h.1": 4}})
    sink.close()
    sink.close()
    first, last = file.getvalue().splitlines()
    assert first.startswith("stabmon watches 2 layers, 8 heads of ")
    assert first.endswith(f"records go to {tmp_path / 'one' / 'stabmon'}")
    assert last == (
        f"stabmon done at step 30: 3 samples, no issue; see stabmon report {tmp_path / 'one'}"
    )


def test_an_incident_is_one_line_and_its_advice_another() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file)
    sink.write_incidents(opened(eta_steps=42.4))
    found, advice = file.getvalue().splitlines()
    assert "\x1b" not in found
    assert found.startswith("stabmon step 30  error: attention entropy collapsed in ")
    assert f"{LAYERS[1]} head 2" in found
    assert "normalized entropy 0.034" in found
    assert "in about 42 steps" in found
    assert "lower the learning rate [1e-4] or add QK-norm" in advice


def test_repetitions_and_warnings_are_counted_at_the_end_alone() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file)
    sink.open(None, META)
    issues = [issue(step, head=head) for step in (30, 40) for head in range(8)]
    issues += [issue(50, issue_type="loss_spike", layer=None, head=None, severity="warning")]
    for incident in incidents_of(issues):
        sink.write_incidents([incident])
    sink.close()
    start, *_, last = lines = file.getvalue().splitlines()
    assert start.startswith("stabmon watches ")
    assert len(lines) == 4
    assert "1 alarm, 1 still open; the first at step 30: attention entropy collapsed" in last


def test_worsening_and_closing_are_reported() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file)
    states = [
        issue(30),
        issue(40, state="worsened", severity="critical"),
        issue(50, state="closed", severity="info", value=0.4, evidence={"worst_value": 0.01}),
    ]
    for incident in incidents_of(states):
        sink.write_incidents([incident])
    _first, advice, worse, closed = file.getvalue().splitlines()
    assert "  critical: " in worse
    assert "  closed: " in closed
    assert "normalized entropy 0.4 now, 0.01 at worst" in closed
    assert "learning rate" in advice
    assert "learning rate" not in worse + closed


def test_severities_differ_in_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for severity in ("warning", "error", "critical"):
        file = Terminal()
        ConsoleSink(file=file, verbose=True).write_incidents(opened(severity=severity))
        lines.append(file.getvalue().replace(severity, "").split("attention")[0].strip())
    assert all("\x1b[" in line for line in lines)
    assert len(set(lines)) == 3
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    ConsoleSink(file=file).write_incidents(opened())
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", file.getvalue())


def test_readings_are_silent_unless_asked_for() -> None:
    quiet, verbose = io.StringIO(), io.StringIO()
    for sink in (ConsoleSink(file=quiet), ConsoleSink(file=verbose, verbose=True)):
        sink.write_reading(reading(10), SCALARS)
    assert quiet.getvalue() == ""
    assert (
        verbose.getvalue()
        == "stabmon step 10  loss 3.99  largest score 12  least entropy 0.25  open issues 1\n"
    )


def test_interventions_are_printed() -> None:
    file = io.StringIO()
    ConsoleSink(file=file).write_intervention(
        {
            "step": 30,
            "action": "applied",
            "intervention": "lower_learning_rate",
            "before": {"lr": 0.02},
            "after": {"lr": 0.01},
        }
    )
    assert (
        file.getvalue()
        == "stabmon step 30  intervention: applied lower_learning_rate: lr 0.02 -> 0.01\n"
    )


def test_it_writes_to_standard_error_as_it_is_then(capsys: pytest.CaptureFixture[str]) -> None:
    SINKS["console"]().write_incidents(opened())
    out, err = capsys.readouterr()
    assert out == ""
    assert "attention entropy collapsed" in err


def test_a_tqdm_bar_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=10, file=screen, ncols=40, mininterval=0) as bar:
        bar.update(5)
        before = len(screen.getvalue())
        ConsoleSink().write_incidents(opened())
        written = screen.getvalue()[before:]
    cleared, line = written.split("stabmon", 1)
    assert cleared.endswith("\r") or "\x1b" in cleared
    assert "50%" not in cleared
    assert line.index("\n") < line.index("50%")


def test_a_rich_display_prints_the_line_above_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Live(
        "BAR", console=Console(file=screen, width=200, force_terminal=True), auto_refresh=False
    ) as live:
        live.refresh()
        before = len(screen.getvalue())
        ConsoleSink().write_incidents(opened())
        written = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", screen.getvalue()[before:])
    assert written.index("attention entropy") < written.index("BAR")
