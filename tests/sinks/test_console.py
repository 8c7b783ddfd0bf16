"""What the terminal shows."""

import io
import re
import sys

import pytest
from rich.console import Console
from rich.live import Live
from tqdm import tqdm  # type: ignore[import-untyped]

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


def test_an_issue_is_one_line_with_place_value_and_advice() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file)
    sink.open(None, META)
    sink.write_issue(issue(30, eta_steps=42.4))
    text = file.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert f"{LAYERS[1]} head 2" in text
    assert "lower the learning rate [1e-4] or add QK-norm" in text
    for part in (
        "step 30",
        "error",
        "entropy_collapse",
        "value 0.034",
        "limit 0.1",
        "about 42 steps",
    ):
        assert part in text


def test_worsening_and_closing_are_said() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file)
    sink.write_issue(issue(30, state="worsened", severity="critical"))
    sink.write_issue(issue(40, state="closed", severity="info"))
    worse, closed = file.getvalue().splitlines()
    assert "critical" in worse
    assert "worsened" in worse
    assert "closed" in closed
    assert "learning rate" not in closed


def test_severities_differ_in_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for severity in ("warning", "error", "critical"):
        file = Terminal()
        ConsoleSink(file=file).write_issue(issue(1, severity=severity))
        lines.append(file.getvalue().replace(severity, "").split("entropy")[0].strip())
    assert all("\x1b[" in line for line in lines)
    assert len(set(lines)) == 3
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    ConsoleSink(file=file).write_issue(issue(1))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", file.getvalue())


def test_readings_are_silent_unless_asked_for() -> None:
    quiet, verbose = io.StringIO(), io.StringIO()
    for sink in (ConsoleSink(file=quiet), ConsoleSink(file=verbose, verbose=True)):
        sink.write_reading(reading(10), SCALARS)
    assert quiet.getvalue() == ""
    assert (
        verbose.getvalue()
        == "stabmon step 10  loss 3.99  max logit 12  least entropy 0.25  1 issues open\n"
    )


def test_a_flood_is_counted_not_printed() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file=file, lines_per_step=3)
    for head in range(10):
        sink.write_issue(issue(30, head=head, severity="critical" if head == 9 else "warning"))
    assert file.getvalue().count("\n") == 3
    sink.write_reading(reading(40), {})
    sink.write_issue(issue(40))
    lines = file.getvalue().splitlines()
    assert lines[3] == "stabmon step 30  and 7 more issues (1 critical, 6 warning)"
    assert len(lines) == 5
    sink.close()
    sink.close()
    assert len(file.getvalue().splitlines()) == 5


def test_interventions_are_printed() -> None:
    file = io.StringIO()
    ConsoleSink(file=file).write_intervention(
        {"step": 30, "intervention": "lower_learning_rate", "factor": 0.5, "heads": [1]}
    )
    assert file.getvalue() == "stabmon step 30  intervention  lower_learning_rate  factor 0.5\n"


def test_it_writes_to_standard_error_as_it_is_then(capsys: pytest.CaptureFixture[str]) -> None:
    SINKS["console"]().write_issue(issue(30))
    out, err = capsys.readouterr()
    assert out == ""
    assert "entropy_collapse" in err


def test_a_tqdm_bar_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=10, file=screen, ncols=40, mininterval=0) as bar:
        bar.update(5)
        before = len(screen.getvalue())
        ConsoleSink().write_issue(issue(30))
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
        ConsoleSink().write_issue(issue(30))
        written = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", screen.getvalue()[before:])
    assert written.index("entropy_collapse") < written.index("BAR")
