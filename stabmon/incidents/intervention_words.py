"""Audit records of interventions as sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from stabmon.records import counted
from stabmon.rules.wording.description import in_order
from stabmon.rules.wording.numbers import number

VERBS = {
    "applied": "applied {}",
    "undone": "took {} back",
    "released": "released {}",
    "relaxed": "loosened {}",
    "refused": "could not apply {}",
    "gave_up": "has nothing left to try",
    "skipped": "{}: a step was left out",
    "again": "applied {} again",
}
"""Words for each action of a record."""

ARMED = "in place from the start"
"""Reason of an intervention that waits for its cause, as the guard words it."""
NOT_DONE = ("refused", "gave_up")
"""Actions that leave the run as it is."""
CHANGING = ("applied", "again")
"""Actions that make the change whose values the record has before and after."""
MOST_OF_A_NOTE = 160
"""Characters of a reason or a note; the record has the whole."""


def intervention_text(record: Mapping[str, Any]) -> str:
    """Return an audit record as one sentence.

    Args:
        record: plain values, as in a line of ``interventions.jsonl``.

    Returns:
        Action, name, places, values before and after, the reason and the note; without a full stop.

    Example:
        >>> intervention_text({
        ...     "intervention": "lower_learning_rate", "action": "applied", "step": 50,
        ...     "before": {"learning_rate": 0.03}, "after": {"learning_rate": 0.015},
        ...     "why": "loss_spike at run"})
        'applied lower_learning_rate: learning_rate 0.03 -> 0.015; reason: loss_spike at run'
    """
    name, action = record.get("intervention"), str(record.get("action", "applied"))
    text = VERBS.get(action, f"{action} {{}}").format(name or "")
    if name and "{}" not in VERBS.get(action, "{}"):
        text += f" ({name})"
    text = text.strip() + _places(record)
    if action in CHANGING:
        changes = _changes(record.get("before"), record.get("after"))
        text += f": {changes}" if changes else ""
    for key, words in (("why", "reason: "), ("note", "")):
        value = record.get(key)
        if isinstance(value, str) and value:
            text += f"; {words}{textwrap.shorten(value, MOST_OF_A_NOTE, placeholder=' …')}"
    return text


def is_armed(record: Mapping[str, Any]) -> bool:
    """Return whether an audit record is of an intervention that waits from the start.

    >>> is_armed({"action": "applied", "why": ARMED}), is_armed({"action": "applied"})
    (True, False)
    """
    return record.get("why") == ARMED


def is_change(record: Mapping[str, Any]) -> bool:
    """Return whether an audit record is of something done to the run at its step.

    >>> is_change({"action": "applied"}), is_change({"action": "refused"})
    (True, False)
    """
    return record.get("action") not in NOT_DONE and not is_armed(record)


def places_of(record: Mapping[str, Any]) -> list[tuple[str | None, int | None]]:
    """Return the (layer, head) places of an audit record; ``(None, None)`` is the run."""
    places = record.get("places")
    if isinstance(places, list | tuple) and places:
        return [(each[0], each[1]) for each in places if len(each) == 2]
    return [(record.get("layer"), record.get("head"))]


def _places(record: Mapping[str, Any]) -> str:
    """Return the places in words, with the preposition; empty for the run."""
    places = [(layer, head) for layer, head in places_of(record) if layer is not None]
    layers = sorted({layer for layer, _ in places}, key=in_order)
    if not layers:
        return ""
    heads = len({place for place in places if place[1] is not None})
    if len(layers) == 1:
        if len(places) == 1 and places[0][1] is not None:
            return f" at {layers[0]} head {places[0][1]}"
        return f" at {layers[0]}" + (f" ({counted(heads, 'head')})" if heads else "")
    among = counted(len(layers), "layer") + (f", {counted(heads, 'head')}" if heads else "")
    return f" at {layers[0]} … {layers[-1]} ({among})"


def _changes(before: Any, after: Any) -> str:
    """Return quantities before and after; of one of many places the one that changed most."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ""
    parts = []
    for name in after:
        pairs = _pairs(before.get(name), after[name])
        if pairs:
            old, new = max(pairs, key=lambda pair: abs(pair[1] - pair[0]) / (abs(pair[0]) or 1.0))
            more = f" (largest of {len(pairs)} changes)" if len(pairs) > 1 else ""
            parts.append(f"{name} {number(old)} -> {number(new)}{more}")
    return ", ".join(parts)


def _pairs(before: Any, after: Any) -> list[tuple[float, float]]:
    """Return the pairs of numbers at the same place of two plain values."""
    if isinstance(before, bool) or isinstance(after, bool):
        return []
    if isinstance(before, int | float) and isinstance(after, int | float):
        return [(float(before), float(after))] if before != after else []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return [pair for key in after if key in before for pair in _pairs(before[key], after[key])]
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        zipped = zip(before, after, strict=False)
        return [pair for old, new in zipped for pair in _pairs(old, new)]
    return []
