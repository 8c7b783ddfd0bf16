"""Facts of runs, and the differences between several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stabmon.report.numbers import number, plural
from stabmon.report.run.loading import Run, when
from stabmon.report.run.signals import title_of
from stabmon.report.run.spans import incident_spans, interventions_between
from stabmon.report.run.timeline import losses_of
from stabmon.report.run.verdict import Verdict, age_in_words

OUTCOMES = (
    ("normalized_entropy", min),
    ("attention_entropy", min),
    ("max_logit", max),
    ("hnf_log_curvature", max),
    ("precision_bits", max),
)
"""Signals whose extreme over a run is compared."""


def facts_of(run: Run) -> list[tuple[str, str]]:
    """Return name and value of what a reader must know of a run."""
    meta, signals = run.meta, run.signals
    model, versions = _mapping(meta, "model"), _mapping(meta, "versions")
    found = [("folder", str(run.folder))]
    if model:
        size = model.get("parameters")
        trained = model.get("trainable")
        words = f", {number(size)} parameters" if isinstance(size, int) else ""
        if isinstance(trained, int) and trained != size:
            words += f", {number(trained)} of them trained"
        found.append(("model", f"{model.get('class', '')}{words}"))
    if signals.layers:
        heads = sorted({heads for _, heads in signals.layers})
        each = " or ".join(map(str, heads))
        found.append(("attention", f"{plural(len(signals.layers), 'layer')} of {each} heads"))
    if formats := _formats(run):
        found.append(("number format of the scores", formats))
    if run.last_step:
        found.append((f"{run.unit}s", f"{run.first_step:,} to {run.last_step:,}"))
        found.append(("sampled", plural(len(signals.steps), run.unit)))
    if started := when(meta.get("started")):
        found.append(("newest start", started))
    if ended := when(meta.get("ended")):
        found.append(("ended", ended))
    found.append(("newest record", f"{age_in_words(run.age)} before this page was written"))
    if framework := meta.get("framework"):
        found.append(("framework", str(framework)))
    if versions:
        found.append(("versions", ", ".join(f"{name} {each}" for name, each in versions.items())))
    if share := _overhead(run):
        found.append(("share of the time spent in stabmon", share))
    if run.earlier:
        found.append(
            (
                "earlier runs in this folder",
                f"{len(run.earlier)}; show one with {run.folder.parent}#1",
            )
        )
    return found


def settings_of(run: Run) -> list[tuple[str, str]]:
    """Return every setting by its dotted name."""
    return [(name, _shown(value)) for name, value in _flat(_mapping(run.meta, "config")).items()]


def differences(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Return what differs between runs, the outcome first.

    Args:
        runs: two or more runs.
        verdicts: one for each.

    Returns:
        Rows of a name and one value a run.
    """
    outcomes = [_outcome(run, verdict) for run, verdict in zip(runs, verdicts, strict=True)]
    setups = [
        {
            **{f"model.{name}": each for name, each in _flat(_mapping(run.meta, "model")).items()},
            "layers": len(run.signals.layers),
            "heads": run.signals.heads,
            "framework": run.meta.get("framework"),
            "number format": _formats(run),
            **{
                f"settings.{name}": each
                for name, each in _flat(_mapping(run.meta, "config")).items()
            },
            **{f"version.{name}": each for name, each in _mapping(run.meta, "versions").items()},
        }
        for run in runs
    ]
    rows = []
    for found in (outcomes, setups):
        for name in dict.fromkeys(name for each in found for name in each):
            values = [_shown(each.get(name)) for each in found]
            if len(set(values)) > 1:
                rows.append((name, *values))
    return rows


def _outcome(run: Run, verdict: Verdict) -> dict[str, Any]:
    spans = incident_spans(run)
    _, losses = losses_of(run)
    finite = losses[np.isfinite(losses)]
    rates = [each.learning_rate for each in run.records.readings if each.learning_rate is not None]
    found: dict[str, Any] = {
        "verdict": verdict.level,
        "state": run.state,
        f"last {run.unit}": run.last_step,
        "last loss": number(finite[-1]) if len(finite) else None,
        "lowest loss": number(finite.min()) if len(finite) else None,
        "largest learning rate": number(max(rates)) if rates else None,
        "incidents": len(spans),
        "incidents with an alarm": sum(each.is_alarm for each in spans),
        "interventions": len(interventions_between(run, 1, math.inf)),
    }
    for name, extreme in OUTCOMES:
        values = run.signals.values.get(name)
        if values is not None and np.isfinite(values).any():
            word = "lowest" if extreme is min else "largest"
            title = title_of(name).removeprefix("largest ")
            found[f"{word} {title}"] = number(extreme(values[np.isfinite(values)].tolist()))
    return found


def _formats(run: Run) -> str:
    infos = [info for reading in run.records.readings[-1:] for info in reading.info.values()]
    return ", ".join(sorted({info.dtype for info in infos}))


def _overhead(run: Run) -> str:
    shares = [
        each.overhead_fraction
        for each in run.records.readings
        if each.overhead_fraction is not None
    ]
    return f"{100 * float(np.median(shares)):.2g}% (median)" if shares else ""


def _mapping(meta: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = meta.get(name)
    return found if isinstance(found, Mapping) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return "–" if not value else str(dict(value))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return number(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
