"""The command ``stabmon watch``."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabmon.cli.options import FailOn, Json, check_fail_on

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "normalized_entropy",
    "max_logit",
    "max_probability",
    "hnf_log_curvature",
    "precision_bits",
)
"""Signals shown for every layer."""


def watch(
    run_dir: Annotated[
        str, typer.Argument(help="The run's output folder, or the stabmon folder in it.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Show the present state and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    fail_on: FailOn = "error",
    as_json: Json = False,
) -> None:
    """Show a run's layers and open issues, live from its records, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from stabmon.sinks.reader import read_records

    check_fail_on(fail_on)
    records = read_records(run_dir)
    if as_json:
        latest = records.readings[-1].step if records.readings else None
        issues = [issue.to_dict() for issue in records.issues]
        state = {"step": latest, "readings": len(records.readings), "issues": issues}
        print(json.dumps(state, default=str))
    elif once or not sys.stdout.isatty():
        Console().print(_view(records))
    else:
        with Live(_view(records), refresh_per_second=4) as live:
            try:
                while True:
                    time.sleep(every)
                    records = read_records(run_dir)
                    live.update(_view(records))
            except KeyboardInterrupt:
                pass
    if _has_finding(records, fail_on):
        raise typer.Exit(1)


def _has_finding(records: Any, fail_on: str) -> bool:
    from stabmon.records import SEVERITIES

    least = SEVERITIES.index("warning" if fail_on == "warning" else "error")
    return any(SEVERITIES.index(issue.severity) >= least for issue in records.issues)


def _view(records: Any) -> Table:
    """Return the newest reading, one row per layer, above the open issues."""
    from rich.table import Table

    from stabmon.sinks.scalars import dashboard_scalars

    if not records.readings:
        return Table(title=f"{records.folder}: no reading yet")
    reading = records.readings[-1]
    loss = "unknown" if reading.loss is None else f"{reading.loss:.4f}"
    title = f"step {reading.step}, loss {loss}, {len(records.readings)} readings"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    scalars = dashboard_scalars(reading, (), alarms=0)
    for layer in reading.layers:
        values = [scalars.get(f"attention_layers/{layer}/{name}") for name in COLUMNS]
        table.add_row(layer, *("–" if value is None else f"{value:.3g}" for value in values))
    table.caption = "\n".join(_open_issues(records)) or "no issue is open"
    table.caption_justify = "left"
    return table


def _open_issues(records: Any) -> list[str]:
    newest = records.runs[-1] if records.runs else records
    latest = {issue.key: issue for issue in newest.issues}
    return [
        f"{i.severity}: {i.issue_type}, {i.where}, since step {i.step}, value {i.value:.4g}"
        for i in latest.values()
        if i.state != "closed"
    ]
