"""Run ``stabmon watch``: live, once, or as JSON."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from stabmon._storage import strict_json
from stabmon.cli.watching.find_run import find_run, missing
from stabmon.cli.watching.follower import Follower
from stabmon.cli.watching.screen import Screen
from stabmon.cli.watching.words import fitting
from stabmon.records import SEVERITIES
from stabmon.sinks.jsonl import READINGS
from stabmon.sinks.stored.readings_tail import count_readings
from stabmon.sinks.stored.run_tail import RunState, RunTail


def run(path: Path, *, every: float, once: bool, as_json: bool, fail_on: str) -> bool:
    """Show the run at or below a path: once, as JSON, or until the user leaves.

    Args:
        path: the run's folder, or one above runs.
        every: seconds between looks.
        once: show the present state and leave, as also where standard output is no terminal.
        as_json: print one JSON object instead.
        fail_on: ``warning`` or ``error``.

    Returns:
        True if there is a finding.

    Raises:
        ValueError: if there are no records; a live view waits for them.
    """
    console = Console()
    if not (as_json or once) and console.is_terminal and not console.is_dumb_terminal:
        live = _live(Follower(path, every))
        return live is not None and has_finding(live, fail_on)
    folder = find_run(path)
    if folder is None:
        raise ValueError(missing(path.absolute()))
    state = RunTail(folder).look()
    if state.trouble:
        raise ValueError(f"the stabmon records cannot be read: {state.trouble}")
    if as_json:
        print(strict_json.dumps(as_values(state)))
    else:
        _print_screen(state, console)
    return has_finding(state, fail_on)


def as_values(state: RunState) -> dict[str, Any]:
    """Return a run as plain values, for ``--json``.

    Args:
        state: the run, as just looked at.

    Returns:
        ``folder``, ``run``, the newest ``step`` and ``loss``, the number of ``readings``,
        ``seconds_since_reading``, ``issues``, ``incidents``, ``interventions`` and ``gaps``.

    Raises:
        ValueError: if the readings cannot be counted.
    """
    reading, last = state.reading, state.last_line
    try:
        readings = count_readings(state.folder / READINGS)
    except OSError as error:
        raise ValueError(f"the stabmon records cannot be read: {error}") from error
    return {
        "folder": str(state.folder),
        "run": state.run,
        "step": None if reading is None else reading.step,
        "loss": None if reading is None else reading.loss,
        "readings": readings,
        "seconds_since_reading": None if last is None else round(time.time() - last, 1),
        "issues": [each.to_dict() for each in (*state.earlier_issues, *state.issues)],
        "incidents": [each.to_dict() for each in state.incidents],
        "interventions": list(state.interventions),
        "gaps": [gap.to_dict() for gap in state.gaps],
    }


def has_finding(state: RunState, fail_on: str) -> bool:
    """Return whether any run in the folder had an issue of at least this severity.

    Args:
        state: the run and the issues of those before it.
        fail_on: ``warning`` or ``error``.
    """
    least = SEVERITIES.index("warning" if fail_on == "warning" else "error")
    issues = (*state.earlier_issues, *state.issues)
    return any(SEVERITIES.index(issue.severity) >= least for issue in issues)


def _print_screen(state: RunState, console: Console) -> None:
    """Print the screen: on a terminal as much as fits, elsewhere all of it."""
    height = console.height - 1 if console.is_terminal else None
    for line in fitting(Screen(state).lines(console.width, height), console.file):
        console.print(line, soft_wrap=True, highlight=False)


def _live(follower: Follower) -> RunState | None:
    """Show the run until the user leaves, with keys where textual is installed."""
    if find_spec("textual") is None:
        from stabmon.cli.watching.live import show

        return show(follower)
    from stabmon.cli.watching.app import WatchApp

    WatchApp(follower).run()
    return follower.state
