"""Forecasts of damage, held against what happened afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stabmon.records import StabilityIssue
from stabmon.report.numbers import number
from stabmon.report.run.loading import Run
from stabmon.report.run.signals import title_of
from stabmon.report.run.spans import interventions_between, issue_spans
from stabmon.rules.base import rule_name, rule_of


@dataclass(frozen=True)
class Outcome:
    """A forecast and its outcome."""

    issue: StabilityIssue
    """The issue that made the forecast."""
    due: float
    """Step at which damage was expected."""
    soonest: float
    """Earliest step of the forecast's interval."""
    latest: float
    """Latest step of it; inf where it is open."""
    came: int | None
    """Step at which the level was met; None if it never was, or cannot be known."""
    text: str
    """The outcome in words."""

    @property
    def expected(self) -> str:
        """The forecast in words."""
        latest = f"{self.latest:,.0f}" if math.isfinite(self.latest) else "later"
        return f"step {self.due:,.0f} ({self.soonest:,.0f} to {latest})"


def outcomes(run: Run) -> list[Outcome]:
    """Hold the first forecast of every issue against the rest of the run.

    Args:
        run: the run.

    Returns:
        One outcome for each opened issue with a forecast, in the order of steps.
    """
    found = []
    for span in issue_spans(run.records.issues):
        made = _first_forecast(run, span.issue, span.end)
        if made is not None and made.eta_steps is not None:
            found.append(_outcome(run, made, made.eta_steps, span.end))
    return sorted(found, key=lambda each: each.issue.step)


def _first_forecast(run: Run, opened: StabilityIssue, end: int | None) -> StabilityIssue | None:
    """Return the first emission of an issue, while it is open, that forecasts damage."""
    last = math.inf if end is None else end
    for issue in run.records.issues:
        own = issue.key == opened.key and opened.step <= issue.step <= last
        if own and issue.state != "closed" and 0 < (issue.eta_steps or 0) < math.inf:
            return issue
    return None


def _outcome(run: Run, issue: StabilityIssue, eta: float, end: int | None) -> Outcome:
    low, high = _interval(issue, eta)
    due, soonest, latest = issue.step + eta, issue.step + low, issue.step + high
    level = _level(run, issue)
    if level is None:
        return Outcome(issue, due, soonest, latest, None, "no level to hold it against is stored")
    name, value = level
    came = _first_above(run, issue, name, value)
    what = f"{title_of(name)} {number(value)}"
    if came is not None:
        how = (
            "sooner than forecast"
            if came < soonest
            else "later than forecast"
            if came > latest
            else "within the interval"
        )
        return Outcome(issue, due, soonest, latest, came, f"{what} was met at step {came:,}, {how}")
    between = interventions_between(run, issue.step, latest)
    if between:
        first = between[0]
        at = f"{first.get('intervention')} at step {first.get('step', 0):,}"
        text = f"did not come: {at} came between"
    elif end is not None and end <= latest:
        text = f"did not come: the issue closed at step {end:,}"
    elif run.last_step < latest:
        text = f"not met by step {run.last_step:,}, the last one; it was not overdue yet"
    else:
        text = f"did not come by step {run.last_step:,}"
    return Outcome(issue, due, soonest, latest, None, text)


def _interval(issue: StabilityIssue, eta: float) -> tuple[float, float]:
    """Return the fewest and most steps until damage; the forecast itself where none is stored."""
    pair = issue.evidence.get("eta_interval")
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return eta, eta
    low, high = (float(each) if isinstance(each, int | float) else math.nan for each in pair)
    return (eta if math.isnan(low) else low), (eta if math.isnan(high) else high)


def _level(run: Run, issue: StabilityIssue) -> tuple[str, float] | None:
    """Return the signal and the level that the issue's rule forecasts."""
    rule = rule_of(issue.issue_type)
    signal, level = getattr(rule, "value_of", None), getattr(rule, "damage_level", None)
    if rule is None or not isinstance(signal, str) or signal not in run.signals.values:
        return None
    config = run.meta.get("config")
    rules = config.get("rules", {}) if isinstance(config, Mapping) else {}
    given = rules.get(rule_name(rule)) if isinstance(rules, Mapping) else None
    if isinstance(given, Mapping):
        level = given.get("damage_level", level)
    return (signal, float(level)) if isinstance(level, int | float) else None


def _first_above(run: Run, issue: StabilityIssue, signal: str, level: float) -> int | None:
    """Return the first step after a forecast at which its heads reach the level."""
    places = run.signals.places()
    if issue.layer not in places:
        return None
    heads = places[issue.layer]
    columns = range(heads.start, heads.stop) if issue.head is None else [heads.start + issue.head]
    values = run.signals.values[signal][:, list(columns)]
    with np.errstate(invalid="ignore"):
        above = (run.signals.steps >= issue.step) & (values >= level).any(axis=1)
    return int(run.signals.steps[above][0]) if above.any() else None
