"""Verdict on a run in words: what happened, what to do next, what was looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stabmon.incidents import Incident, intervention_text
from stabmon.records import SEVERITIES
from stabmon.report.numbers import number, plural
from stabmon.report.run.loading import Run, when
from stabmon.report.run.spans import incident_spans, interventions_between
from stabmon.report.run.timeline import losses_of
from stabmon.sinks.delivery.gaps import in_words

LEVELS = {
    "healthy": "✓",
    "look": "!",
    "recovered": "↺",
    "damaged": "✕",
    "broken": "✕",
    "empty": "?",
}
"""Level of a verdict and its sign, which is read without colour."""


@dataclass(frozen=True)
class Verdict:
    """Sentences on a run for a reader who knows nothing of it."""

    level: str
    """One of :data:`LEVELS`."""
    headline: str
    """The outcome in one sentence."""
    details: tuple[str, ...] = ()
    """Evidence, sentence by sentence."""
    advice: str = ""
    """Advice on the next step."""
    code: str = ""
    """Lines of code that do it."""
    state: str = ""
    """End of the run, and age of its records."""
    looked_at: str = ""
    """Layers, heads, signals and steps that the verdict covers."""
    missing: tuple[str, ...] = ()
    """Parts that it does not cover."""

    @property
    def sign(self) -> str:
        """Sign of its level."""
        return LEVELS[self.level]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "level": self.level,
            "headline": self.headline,
            "details": list(self.details),
            "next": self.advice,
            "code": self.code,
            "state": self.state,
            "looked_at": self.looked_at,
            "not_covered": list(self.missing),
        }


def verdict_of(run: Run) -> Verdict:
    """Judge a run by its stored incidents.

    Args:
        run: the run.

    Returns:
        The verdict; of level ``empty`` where nothing was measured.
    """
    judged = _judged(run)
    return replace(
        judged, state=state_in_words(run), looked_at=_looked_at(run), missing=_missing(run)
    )


def _judged(run: Run) -> Verdict:
    """Return level, headline, details, advice and code."""
    if run.is_empty:
        return Verdict(
            "empty",
            "Nothing was measured: the records hold no reading.",
            advice=_why_empty(run),
        )
    spans = incident_spans(run)
    worst = next((each for each in run.open if each.is_alarm), None)
    details = _details(run, worst)
    broken = _not_finite(run)
    if worst is not None:
        level = "broken" if worst.cause == "non_finite" or broken else "damaged"
        return Verdict(
            level,
            f"{_damage(worst)}: {worst.headline}, since step {worst.first_step:,}.",
            details,
            worst.advice,
            worst.code,
        )
    if broken:
        text = "The run is broken: its loss is no longer finite."
        advice = "Go back to the last checkpoint whose loss was finite, with a lower learning rate."
        return Verdict("broken", text, details, advice)
    alarms = [each for each in spans if each.is_alarm]
    if alarms and not run.open:
        first = alarms[0].incident
        more = f" and {plural(len(alarms) - 1, 'other alarm')}" if len(alarms) > 1 else ""
        return Verdict(
            "recovered",
            f"Recovered: {first.headline} from step {first.first_step:,}{more}; nothing is open at "
            "the end.",
            details,
            "Nothing at once. If it comes again: " + first.advice if first.advice else "",
            first.code,
        )
    looks = [each.incident for each in spans if SEVERITIES.index(each.severity) >= 1]
    if looks:
        return Verdict("look", *_look(run, looks, len(alarms), details))
    return Verdict("healthy", _healthy(run), details, "Nothing has to be done.")


def state_in_words(run: Run) -> str:
    """Return in words whether a run ended, was resumed, and how old its records are."""
    ago = f"{age_in_words(run.age)} ago"
    at = f"{run.unit} {run.last_step:,}"
    said = {
        "ended": f"The run ended after {at}",
        "running": f"The run goes on: the newest record is of {at}, written {ago}",
        "stopped": "The run has no recorded end: it was killed, hangs, or its monitor was not "
        f"closed, after {at}; the newest record was written {ago}",
        "unknown": f"Whether the run ended is not recorded; the newest record is of {at}, written "
        f"{ago}",
    }[run.state]
    if run.state == "ended" and (ended := when(run.meta.get("ended"))) and run.is_newest:
        said += f", {ended}"
    starts = run.starts
    if len(starts) > 1:
        steps = [each.get("first_step") for each in starts[1:]]
        known = [f"{step:,}" for step in steps if isinstance(step, int)]
        places = f", at {run.unit} {', '.join(known)}" if known else ""
        said += f". It was resumed {plural(len(starts) - 1, 'time')}{places}"
    return f"{said}."


def age_in_words(seconds: float) -> str:
    """Return an age in its largest unit.

    Example:
        >>> age_in_words(3), age_in_words(600), age_in_words(200_000)
        ('3 seconds', '10 minutes', '2 days')
    """
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return plural(int(seconds // size), unit)
    return plural(int(seconds), "second")


def has_finding(run: Run, fail_on: str) -> bool:
    """Return whether any issue of a run was at least as severe as ``fail_on``."""
    least = SEVERITIES.index("warning" if fail_on == "warning" else "error")
    return any(SEVERITIES.index(issue.severity) >= least for issue in run.records.issues)


def _damage(worst: Incident) -> str:
    if worst.cause == "non_finite":
        return "The run is broken"
    return "Attention is being damaged" if worst.layers else "Training is being damaged"


def _look(
    run: Run, looks: Sequence[Incident], alarms: int, details: tuple[str, ...]
) -> tuple[str, tuple[str, ...], str, str]:
    """Return headline, details, advice and code of a run in which no alarm is open."""
    if not run.open:
        text = f"{looks[0].headline}, from step {looks[0].first_step:,}, since closed"
        count = plural(len(looks), "warning")
        return f"No alarm, {count}: {text}.", details, "Nothing has to be done.", ""
    shown = run.open[0]
    before = f"{plural(alarms, 'alarm')} closed" if alarms else "No alarm"
    still = f"{plural(len(run.open), 'warning')} {'still ' if alarms else ''}open"
    text = f"{before}, {still}: {shown.headline}, since step {shown.first_step:,}."
    return text, (*_evidence(shown), *details), shown.advice, shown.code


def _evidence(incident: Incident) -> list[str]:
    """Return numbers, effects and forecast of an incident as sentences."""
    parts = (incident.numbers, incident.effects, incident.forecast)
    return [f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts if part]


def _not_finite(run: Run) -> bool:
    """Return whether the newest known loss is NaN or infinite."""
    _, losses = losses_of(run)
    return len(losses) > 0 and not math.isfinite(losses[-1])


def _healthy(run: Run) -> str:
    count = len(run.signals.steps)
    if count == 0:
        return f"No alarm over {run.last_step:,} {run.unit}s, but no attention was measured."
    span = max(1, run.last_step - run.first_step + 1)
    return f"Healthy: {plural(count, 'sample')} over {plural(span, run.unit)}, no alarm."


def _details(run: Run, worst: Incident | None) -> tuple[str, ...]:
    """Return sentences on the worst incident, the other alarms, interventions and the loss."""
    said = []
    if worst is not None:
        said += _evidence(worst)
        others = [each for each in run.open if each.is_alarm and each.number != worst.number]
        if others:
            said.append("Also open: " + "; ".join(each.headline for each in others[:3]) + ".")
    done = interventions_between(run, 1, math.inf)
    if done:
        more = f" ({plural(len(done), 'intervention')} in all)" if len(done) > 1 else ""
        at = f"{run.unit} {done[-1].get('step', 0):,}"
        said.append(f"At {at} stabmon {intervention_text(done[-1]).rstrip('.')}{more}.")
    steps, losses = losses_of(run)
    finite = [at for at in range(len(losses)) if math.isfinite(losses[at])]
    if finite:
        first, last = finite[0], finite[-1]
        said.append(
            f"The loss went from {number(losses[first])} at {run.unit} {steps[first]:,} to "
            f"{number(losses[last])} at {run.unit} {steps[last]:,}."
        )
    return tuple(said)


def _looked_at(run: Run) -> str:
    signals = run.signals
    if not len(signals.steps):
        return "No attention was measured."
    heads = sorted({heads for _, heads in signals.layers})
    each = f" of {heads[0]}" if len(heads) == 1 else ""
    return (
        f"Looked at: {plural(len(signals.layers), 'layer')}{each}"
        f"{f' heads ({signals.heads:,} in all)' if each else f', {signals.heads:,} heads'}, "
        f"{plural(len(signals.values), 'signal')} each, at "
        f"{plural(len(signals.steps), 'sampled ' + run.unit)}."
    )


def _missing(run: Run) -> tuple[str, ...]:
    """Return what the records cannot show, in words."""
    found = []
    unseen = run.meta.get("unseen_attention")
    if isinstance(unseen, Mapping) and unseen:
        names = ", ".join(map(str, list(unseen)[:4])) + (" …" if len(unseen) > 4 else "")
        found.append(
            f"attention that stabmon does not see, in {plural(len(unseen), 'module')}: {names}"
        )
    unwatched = run.meta.get("unwatched")
    if isinstance(unwatched, Mapping):
        found += map(str, unwatched.values())
    readings = run.records.readings
    if readings and run.unit == "step":
        if all(not each.learning_rates and each.learning_rate is None for each in readings):
            found.append("learning rates and updates of weights: the monitor had no optimizer")
        if not any(each.losses or each.loss is not None for each in readings):
            found.append("the loss: it was not given to on_step")
    if run.records.layers_left_out:
        found.append(
            f"some layers in {plural(len(run.records.layers_left_out), 'reading')} of "
            f"{len(readings)}: a line holds as many as fit, in turn, and a layer is shown here as it "
            "was last"
        )
    if run.records.gaps:
        found.append(f"records that could not be written: {in_words(run.records.gaps)}")
    if run.records.skipped:
        found.append(
            f"{plural(len(run.records.skipped), 'line')} of the records that cannot be read"
        )
    config = run.meta.get("config")
    rules = config.get("rules") if isinstance(config, Mapping) else None
    off = (
        [name for name, value in rules.items() if value is False]
        if isinstance(rules, Mapping)
        else []
    )
    if off:
        found.append(f"rules that were turned off: {', '.join(off)}")
    return tuple(found)


def _why_empty(run: Run) -> str:
    sampling = run.meta.get("sampling")
    every = sampling.get("every") if isinstance(sampling, Mapping) else None
    first = sampling.get("first", every) if isinstance(sampling, Mapping) else None
    if run.state == "running":
        step = f", step {first}" if first else ""
        return f"Wait for the first sampled step{step}, and write the page again."
    if every and first == every:
        return (
            f"The run sampled every {every} steps: see that it is longer than that, or lower "
            "log_every, and that on_step is called after each optimizer step."
        )
    return "See that on_step is called after each optimizer step."
