"""Screens of runs at every size: what they say, in which order, and that they fit."""

import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

from stabmon.cli.watching.layer_page import layer_lines
from stabmon.cli.watching.screen import Chosen, Screen
from stabmon.cli.watching.words import ASCII, fitting
from stabmon.records import Reading
from stabmon.sinks.stored.run_tail import RunState, RunTail
from tests.support.written_records import collapse, opened, store, wide_reading


def run(folder: Path, layers: int = 32, heads: int = 16, issues: bool = True) -> RunState:
    """A run of many layers; entropy collapsed in two heads, and a closed spike of the loss."""
    sink = store(folder / "one" / "stabmon", range(10, 210, 10), layers=layers, heads=heads)
    if issues:
        spike = {"layer": None, "head": None, "issue_type": "loss_spike"}
        sink.write_issue(collapse(100, **spike, severity="warning", eta_steps=None))
        sink.write_issue(collapse(150, **spike, severity="info", state="closed", eta_steps=None))
        sink.write_issue(collapse(160))
        sink.write_issue(collapse(170, layer=1, head=3, severity="warning"))
        sink.write_intervention({"intervention": "skip_step", "action": "applied", "step": 180})
    state = RunTail(folder / "one" / "stabmon").look()
    sink.close()
    return state


def text(state: RunState, width: int = 80, height: int | None = 24, **chosen: object) -> list[str]:
    return [line.plain for line in Screen(state, Chosen(**chosen)).lines(width, height)]  # type: ignore[arg-type]


def at(lines: list[str], part: str) -> int:
    return next(place for place, line in enumerate(lines) if part in line)


def test_issues_stand_before_layers_and_interventions_after(tmp_path: Path) -> None:
    state = run(tmp_path)
    lines = text(state, footer="q quit")
    assert lines[0].startswith("stabmon one · step 200 · loss 0.05 · last reading ")
    assert lines[1].startswith("loss ▇")
    opened, layers = at(lines, "open incident"), at(lines, "32 layers × heads")
    assert opened < at(lines, state.open_incidents[0].title) < layers
    assert "closed" in lines[opened]
    assert layers < at(lines, "intervention record") < at(lines, "skip_step") < len(lines) - 1
    assert lines[-1] == "q quit"


@pytest.mark.parametrize("height", [5, 10, 24, 50])
@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (32, 16), (32, 128), (200, 8)])
def test_a_screen_fits_any_terminal(
    tmp_path: Path, layers: int, heads: int, width: int, height: int
) -> None:
    state = run(tmp_path, layers, heads)
    for chosen in ({}, {"layer": layers - 1, "footer": "keys"}, {"filter": "none such"}):
        lines = text(state, width, height, **chosen)
        assert len(lines) == height
        assert all(cell_len(line) <= width and "\n" not in line for line in lines)


def test_at_80_by_24_every_layer_of_32_is_shown_with_its_heads(tmp_path: Path) -> None:
    lines = text(run(tmp_path))
    shown = " ".join(lines[at(lines, "layers × heads") + 1 :])
    row = "▁E" + "▁" * 14
    assert f" 0 {row}" in shown
    assert " 1 ▇▇▇e" in shown
    for layer in range(2, 32):
        assert f"{layer:>2} {'▇' * 16}" in shown
    assert "open issues: E entropy collapse" in shown


def test_heads_share_a_sign_where_they_must_and_the_worst_one_shows(tmp_path: Path) -> None:
    lines = text(run(tmp_path, heads=128))
    title = lines[at(lines, "layers × heads")]
    assert "heads per sign" in title
    assert any(line.lstrip().startswith("0 E") for line in lines)


def test_the_chosen_incident_is_told_in_full(tmp_path: Path) -> None:
    sink = store(tmp_path, (10,))
    spike = {"layer": None, "head": None, "issue_type": "loss_spike", "severity": "warning"}
    sink.write_issue(collapse(10, **spike, suggestion="Skip the batch.", eta_steps=None))
    sink.write_issue(collapse(20))
    sink.close()
    state = RunTail(tmp_path).look()
    assert len(state.open_incidents) == 2
    for place, incident in enumerate(state.open_incidents):
        said = " ".join(" ".join(text(state, 80, 40, incident=place)).split())
        for part in (incident.numbers, incident.forecast, incident.advice):
            assert " ".join(part.split()) in said
        assert all(each.title in said for each in state.open_incidents)


def test_a_healthy_run_and_one_without_a_reading_say_so(tmp_path: Path) -> None:
    healthy = text(run(tmp_path, issues=False))
    assert any("no incident up to step 200" in line for line in healthy)
    sink = opened(tmp_path / "new" / "stabmon")
    waiting = text(RunTail(tmp_path / "new" / "stabmon").look())
    assert "no reading yet, due at step 10" in waiting[0]
    sink.close()


def test_a_silent_run_and_an_absent_disk_are_said_first(tmp_path: Path) -> None:
    state = run(tmp_path)
    late = Screen(state, now=time.time() + 245)
    assert "no line for 4 min" in late.lines(80, 24)[0].plain
    ended = {"ended": datetime.fromtimestamp(time.time() - 7300, UTC).isoformat()}
    assert "ended 2.0 h ago" in text(replace(state, meta=ended))[0]
    (tmp_path / "one").rename(tmp_path / "away")
    tail = RunTail(tmp_path / "one" / "stabmon")
    assert "cannot be read now" in text(tail.look())[1]


def test_other_signals_and_a_filter_are_shown(tmp_path: Path) -> None:
    state = run(tmp_path)
    scores = text(state, signal=1)
    assert "largest score (▁ " in scores[at(scores, "layers × heads")]
    some = text(state, filter="H.1")
    assert "11 layers × heads" in some[at(some, "layers × heads")]
    none = text(state, filter="mlp")
    assert any("no layer matches 'mlp'" in line for line in none)


def test_without_a_height_all_of_it_is_printed_with_full_names(tmp_path: Path) -> None:
    state = run(tmp_path)
    lines = text(state, 80, None)
    assert sum(line.startswith(f"h.{n}.attn ") for n in range(32) for line in lines) == 32
    said = " ".join(" ".join(lines).split())
    assert " ".join(state.open_incidents[0].advice.split()) in said


def test_values_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    values = {"normalized_entropy": np.array([0.5, math.nan])}
    for step, loss in ((10, 2.0), (20, math.nan)):
        sink.write_reading(Reading(step, loss, {"attn": values}), {})
    sink.close()
    lines = text(RunTail(tmp_path).look())
    assert any(line.startswith("attn ▄×") for line in lines)
    assert "×" in lines[1]
    assert "loss nan" in lines[0]


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    evil = "h.\x1b[2J\x07.attn"
    sink.write_reading(Reading(10, 2.0, {evil: {"max_logit": np.ones(2)}}), {})
    sink.write_issue(collapse(10).__class__(**{**vars(collapse(10)), "layer": evil}))
    sink.close()
    for height in (24, None):
        assert not any(
            "\x1b" in line or "\x07" in line for line in text(RunTail(tmp_path).look(), 80, height)
        )


def test_a_terminal_without_unicode_gets_letters_as_wide(tmp_path: Path) -> None:
    class Latin:
        encoding = "latin-1"

    lines = Screen(run(tmp_path)).lines(80, 24)
    before = [line.cell_len for line in lines]
    shown = fitting(lines, Latin())  # type: ignore[arg-type]
    assert [line.cell_len for line in shown] == before
    assert all(line.plain.isascii() for line in shown)
    assert all(
        len(chr(one)) == len(other) for one, other in ((k, chr(v)) for k, v in ASCII.items())
    )


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_page_of_a_layer_fits_and_shows_its_past(tmp_path: Path, width: int) -> None:
    state = run(tmp_path)
    tail = RunTail(state.folder)
    tail.look()
    assert state.reading is not None
    issues = [issue for issue in state.open_issues if issue.layer == "h.0.attn"]
    history = tail.layer_history("h.0.attn")
    lines = layer_lines("h.0.attn", state.reading, history, issues, width, 20)
    assert all(line.cell_len <= width for line in lines) or width == 40
    said = [line.plain for line in lines]
    assert "layer 1 of 32, step 200" in said[0]
    assert "head 1, since step 160, damage in about 230 steps"[: width - 30] in " ".join(said)
    assert wide_reading(200).layers["h.0.attn"]["normalized_entropy"][0] == 0.005
    row = next(line for line in said if "entropy" in line and "collapse" not in line)
    assert "0.005" in row
