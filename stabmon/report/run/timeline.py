"""Timeline of a run: loss, learning rate, incidents, forecasts and interventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from stabmon.incidents import is_armed
from stabmon.report.numbers import plural
from stabmon.report.run.axes import Scale, scale_of
from stabmon.report.run.charts import LETTER, Canvas, Panel, both_widths, curve
from stabmon.report.run.forecasts import Outcome
from stabmon.report.run.loading import Run
from stabmon.report.run.spans import IncidentSpan, incident_spans

LANES = 8
"""Incidents drawn; the table has all."""
MARKS = {"applied": "▲", "skipped": "▲", "undone": "▽", "released": "△", "refused": "✕"}
"""Sign of each action of an intervention; others get a point."""
INITIALS = {"info": "i", "warning": "W", "error": "E", "critical": "C"}


@dataclass(frozen=True, eq=False)
class Axes:
    """Axes that the timelines of several runs share."""

    span: tuple[float, float]
    """First and last step."""
    loss: Scale
    rate: Scale


def losses_of(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps whose loss is known, and their losses, each ``[T]``."""
    known: dict[int, float] = {}
    for reading in run.records.readings:
        known.update(reading.losses)
        if reading.loss is not None:
            known.setdefault(reading.step, reading.loss)
    steps = np.array(sorted(known), dtype=np.int64)
    return steps, np.array([known[step] for step in steps.tolist()], dtype=np.float64)


def rates_of(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, the largest scheduled rate and the largest rate in use, each ``[T]``."""
    rows = [
        (
            reading.step,
            reading.learning_rate,
            max(reading.used_rates.values(), default=reading.learning_rate),
        )
        for reading in run.records.readings
        if reading.learning_rate is not None
    ]
    if not rows:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    steps, scheduled, used = (np.array(each, dtype=np.float64) for each in zip(*rows, strict=True))
    return steps, scheduled, used


def shared_axes(runs: Sequence[Run]) -> Axes:
    """Return axes on which every run can be drawn."""
    losses = [losses_of(run)[1] for run in runs]
    rates = [part for run in runs for part in rates_of(run)[1:]]
    span = (
        float(min((run.first_step for run in runs if run.records.readings), default=0)),
        float(max((run.last_step for run in runs), default=1)),
    )
    return Axes(span, scale_of(losses), scale_of(rates, (0.0, None), steep=False))


def timeline(run: Run, axes: Axes, forecasts: Sequence[Outcome]) -> Markup:
    """Draw the timeline of one run.

    Args:
        run: the run.
        axes: of all runs of the page.
        forecasts: of :func:`~stabmon.report.run.forecasts.outcomes`.

    Returns:
        SVG for wide and for narrow screens; empty for a run without records.
    """
    if run.is_empty:
        return Markup()
    steps, losses = losses_of(run)
    plots = []
    if len(steps):
        bad = steps[~np.isfinite(losses)]
        shown = bad[:: max(1, len(bad) // 12)][:12].tolist()
        plots.append(Panel("loss", [curve(steps, losses)], axes.loss, 130, bad=shown))
    at, scheduled, used = rates_of(run)
    if len(at):
        curves = [curve(at, scheduled)]
        title = "learning rate"
        if not np.allclose(scheduled, used, equal_nan=True):
            curves = [curve(at, scheduled, "s", 1), curve(at, used, "u")]
            title = "learning rate: s scheduled, u used after interventions"
        plots.append(Panel(title, curves, axes.rate, 52))
    spans = incident_spans(run)

    def draw(canvas: Canvas) -> None:
        for plot in plots:
            plot.draw(canvas)
        _lanes(canvas, run, spans, forecasts)
        _interventions(canvas, run)

    return both_widths(draw, axes.span, _description(run, spans), run.unit)


def _description(run: Run, spans: Sequence[IncidentSpan]) -> str:
    alarms = sum(each.is_alarm for each in spans)
    return (
        f"Timeline of {run.name}: loss and learning rate over {run.unit}s {run.first_step} to "
        f"{run.last_step}, {plural(len(spans), 'incident')} of which {alarms} with an alarm. The "
        "tables below say the same."
    )


def _lanes(
    canvas: Canvas, run: Run, spans: Sequence[IncidentSpan], forecasts: Sequence[Outcome]
) -> None:
    """Draw a bar for each incident, and its first forecast below it."""
    if not spans:
        return
    more = f", {LANES} of {len(spans)}" if len(spans) > LANES else ""
    canvas.title(f"incidents: W warning, E error, C critical{more}")
    canvas.top += 20
    for span in spans[:LANES]:
        start, end = canvas.x(span.start), canvas.x(run.last_step if span.end is None else span.end)
        end = max(end, start + 5)
        room = int((canvas.right - 4) / LETTER)
        said = f"{INITIALS[span.severity]}{span.incident.number} {span.incident.title}"
        said = said if len(said) <= room else f"{said[: room - 1]}…"
        text = max(4.0, min(start, canvas.right - len(said) * LETTER))
        canvas.text(text, canvas.top + 11, said, "lane")
        y = canvas.top + 21
        edges = [*(canvas.x(step) for step, _ in span.parts[1:]), end]
        left = start
        for (_, severity), right in zip(span.parts, edges, strict=True):
            canvas.line(left, y, max(right, left + 3), y, f"bar {severity}")
            left = max(right, left)
        sign = "▶" if span.end is None else "▏"
        canvas.text(end - 1, y + 4.5, sign, f"end {span.severity}")
        canvas.top += 30
        _forecast(canvas, span, forecasts)


def _forecast(canvas: Canvas, span: IncidentSpan, forecasts: Sequence[Outcome]) -> None:
    """Draw an incident's first forecast: its interval, its middle, and what happened."""
    last = math.inf if span.end is None else span.end
    layers = set(span.incident.layers)
    own = [
        each
        for each in forecasts
        if each.issue.layer in layers and span.start <= each.issue.step <= last
    ]
    if not own:
        return
    first = own[0]
    y = canvas.top + 4
    canvas.line(canvas.x(first.soonest), y, canvas.x(min(first.latest, 1e15)), y, "forecast")
    beyond = first.due > canvas.last
    sign = "◇›" if beyond else "◇"
    canvas.text(canvas.x(first.due), y + 4.5, sign, "lane", "end" if beyond else "middle")
    said = "damage forecast"
    if first.came is not None:
        canvas.text(canvas.x(first.came), y + 4.5, "✕", "bad", "middle")
        said = "damage forecast ◇, came ✕"
    left = canvas.x(first.soonest)
    if left - len(said) * LETTER > 4:
        canvas.text(left - 6, y + 4, said, "soft", "end")
    else:
        canvas.text(min(canvas.right, canvas.x(min(first.latest, 1e15)) + 12), y + 4, said, "soft")
    canvas.top += 18


def _interventions(canvas: Canvas, run: Run) -> None:
    """Draw a sign for each intervention, and a line through all plots where one was applied."""
    records = [record for record in run.records.interventions if not is_armed(record)]
    if not records:
        return
    canvas.title("interventions: ▲ applied, △ released, ▽ undone, ✕ refused")
    y = canvas.top + 34
    before = -math.inf
    for record in records:
        x = canvas.x(max(float(record.get("step", 0)), canvas.first))
        action = str(record.get("action", ""))
        if action == "applied":
            canvas.line(x, 22, x, y - 12, "event")
        if x - before >= 9:
            canvas.text(x, y, MARKS.get(action, "•"), "mark", "middle")
            before = x
    canvas.top = y + 8
