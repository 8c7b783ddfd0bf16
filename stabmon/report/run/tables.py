"""Incidents, issues, interventions and layers of a run as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stabmon.incidents import intervention_text
from stabmon.records import SEVERITIES, StabilityIssue
from stabmon.report.numbers import number
from stabmon.report.page import Table
from stabmon.report.run.forecasts import Outcome
from stabmon.report.run.loading import Run
from stabmon.report.run.signals import title_of
from stabmon.report.run.spans import incident_spans
from stabmon.signals.presentation import presentation_of

MOST_ROWS = 3000
"""Rows of a table; issues.jsonl has all."""
UNLIMITED = 1e30
"""Levels from which no limit is named: they are the end of a number format."""


def incident_table(run: Run) -> Table:
    """Return one row for each incident, alarms first."""
    rows = [
        (
            f"{span.incident.number}",
            span.severity,
            f"{span.start:,}",
            "open" if span.end is None else f"{span.end:,}",
            span.incident.headline,
            span.incident.numbers,
            " ".join(part for part in (span.incident.effects, span.incident.forecast) if part),
            span.incident.advice,
        )
        for span in incident_spans(run)
    ]
    head = (
        "no.",
        "worst",
        "from step",
        "to step",
        "incident",
        "numbers",
        "effects and forecast",
        "advice",
    )
    return Table("Incidents: issues with one cause, grouped. Alarms come first.", head, rows)


def issue_table(run: Run) -> Table:
    """Return one row for each opening, worsening and closing of an issue."""
    issues: Sequence[StabilityIssue] = run.records.issues
    caption = "Every issue as it opened, worsened or closed."
    if len(issues) > MOST_ROWS:
        severe = sorted(issues, key=lambda each: -SEVERITIES.index(each.severity))[:MOST_ROWS]
        issues = sorted(severe, key=lambda each: each.step)
        caption += (
            f" The {MOST_ROWS:,} most severe of {len(run.records.issues):,}; issues.jsonl has all."
        )
    rows = [
        (
            f"{issue.step:,}",
            issue.state,
            issue.severity,
            issue.issue_type.replace("_", " "),
            issue.where,
            number(issue.value, 4),
            _limit(issue.threshold),
            "" if issue.eta_steps is None else f"in {issue.eta_steps:,.0f} steps",
        )
        for issue in issues
    ]
    head = ("step", "state", "severity", "issue", "where", "measured", "limit", "damage forecast")
    return Table(caption, head, rows)


def intervention_table(run: Run) -> Table:
    """Return one row for each audit record."""
    rows = [
        (
            f"{record.get('step', 0):,}",
            str(record.get("intervention", "")),
            str(record.get("action", "")),
            intervention_text(record),
        )
        for record in run.records.interventions[:MOST_ROWS]
    ]
    return Table(
        "Interventions as they were applied, released, undone or refused.",
        ("step", "intervention", "action", "in words"),
        rows,
    )


def forecast_table(outcomes: Sequence[Outcome]) -> Table:
    """Return one row for each forecast and its outcome."""
    rows = [
        (f"{each.issue.step:,}", each.issue.where, each.expected, each.text)
        for each in outcomes[:MOST_ROWS]
    ]
    return Table(
        "Forecasts of damage, and what happened.",
        ("made at step", "where", "damage forecast for", "outcome"),
        rows,
    )


def layer_table(run: Run) -> Table:
    """Return one row for each layer with its worst heads over the run, and at its end."""
    signals = run.signals
    rows = []
    for layer, place in signals.places().items():
        row = [layer, str(place.stop - place.start)]
        for name in (signals.entropy, "max_logit"):
            row += _extreme(run, name, place)
        rows.append(row)
    head = (
        "layer",
        "heads",
        "lowest entropy",
        "at",
        "at the end",
        "largest score",
        "at",
        "at the end",
    )
    return Table(
        f"Each layer: lowest {title_of(signals.entropy)} and largest score of any head.", head, rows
    )


def _extreme(run: Run, name: str, place: slice) -> list[str]:
    """Return a signal's worst value over the run, its step and head, and its newest value."""
    values = run.signals.values.get(name)
    if values is None or not np.isfinite(values[:, place]).any():
        return ["–", "–", "–"]
    largest = presentation_of(name).reduction == "max"
    found = np.where(np.isfinite(values[:, place]), values[:, place], np.nan)
    at = int(np.nanargmax(found) if largest else np.nanargmin(found))
    row, head = divmod(at, found.shape[1])
    newest = found[-1][np.isfinite(found[-1])]
    end = (newest.max() if largest else newest.min()) if newest.size else math.nan
    step = int(run.signals.steps[row])
    return [number(float(found[row, head])), f"step {step:,}, head {head}", number(float(end))]


def _limit(value: float) -> str:
    """Return a limit, empty where there is none that a reader could meet."""
    return number(value, 4) if math.isfinite(value) and abs(value) < UNLIMITED else ""


def signal_heading(name: str) -> str:
    """Return a signal's name and unit.

    Example:
        >>> signal_heading("max_logit")
        'largest score (score)'
    """
    return f"{title_of(name)} ({presentation_of(name).unit})"
