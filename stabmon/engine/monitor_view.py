"""The state of a monitor at a glance, as text and as HTML."""

from __future__ import annotations

from pathlib import Path

from stabmon._display.html import card, line
from stabmon.engine.clock import Phase
from stabmon.incidents import Incident
from stabmon.incidents.html import incident_table
from stabmon.interventions import Applied
from stabmon.records import SEVERITIES, counted
from stabmon.rules.tracking.issue_tracker import IssueTracker


def monitor_text(step: int, phase: Phase, every: int, tracker: IssueTracker) -> str:
    """Return step, sampling, layers, heads and open issues of a monitor in one line.

    Args:
        step: optimizer steps seen.
        phase: the monitor's phase.
        every: sampling interval in steps.
        tracker: its history and open issues.
    """
    history, opened = tracker.history, tracker.open_issues
    parts = [
        f"step={step}" if step else "no step yet",
        f"every {every}",
        counted(len(history.layers), "layer"),
        counted(len(history.heads), "head"),
        counted(len(opened), "open issue"),
    ]
    if alarms := sum(issue.is_alarm for issue in opened):
        parts[-1] += f" ({counted(alarms, 'alarm')})"
    parts += ["closed"] if phase is Phase.CLOSED else []
    return f"AttentionStabilityMonitor({', '.join(parts)})"


def monitor_html(
    text: str,
    tracker: IssueTracker,
    incidents: tuple[Incident, ...],
    applied: tuple[Applied, ...],
    run_dir: Path | None,
) -> str:
    """Return the incidents, the last reading, interventions and the folder of records.

    Args:
        text: what :func:`monitor_text` returns.
        tracker: the monitor's history.
        incidents: every incident so far.
        applied: every intervention so far.
        run_dir: folder of the records; None without one.
    """
    opened = [each for each in incidents if each.state != "closed"]
    closed = len(incidents) - len(opened)
    worst = max((each.severity for each in opened), key=SEVERITIES.index, default="info")
    reading = tracker.history.latest if len(tracker.history) else None
    said = f"{counted(len(opened), 'open incident')}, {closed} closed"
    active = sum(each.active for each in applied)
    return card(
        text,
        line(said if incidents else "no incident so far"),
        incident_table(opened),
        line(f"last reading: {reading}" if reading is not None else "no reading yet"),
        line(f"{counted(len(applied), 'intervention')}, {active} active" if applied else ""),
        line(f"records: {run_dir}" if run_dir is not None else "records are not kept on disk"),
        severity=worst,
    )
