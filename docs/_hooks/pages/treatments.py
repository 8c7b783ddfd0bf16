"""Tables of symptoms and of the interventions that treat them, from what leaves declare."""

from __future__ import annotations

from typing import Any

from markup import cell, table

from stabmon.interventions import INTERVENTIONS
from stabmon.records import StabilityIssue
from stabmon.rules import RULES
from stabmon.rules import symptoms as declared
from stabmon.rules.base import rule_name
from stabmon.rules.symptoms import Symptom

KNOWN = sorted(
    (each for each in vars(declared).values() if isinstance(each, Symptom)),
    key=lambda each: each.order,
)
"""Symptoms of stabmon's own rules, in the order in which they are treated."""


def symptoms() -> str:
    """Return the table of symptoms: where each is treated, and what a person can do."""
    rows = [
        (
            f"`{each.name}`",
            "each layer and head" if each.per_location else "the run",
            cell(each.advice),
        )
        for each in KNOWN
    ]
    return table(("symptom", "treated for", "advice when nothing is left to try"), rows)


def treatments() -> str:
    """Return the table of rules and interventions of each symptom."""
    rows = []
    for each in KNOWN:
        rules = [name for name, cls in RULES.items() if each in _symptoms_of(cls)]
        order = {
            name: cls.treats[each.name]
            for name, cls in INTERVENTIONS.items()
            if each.name in cls.treats
        }
        tried = sorted(order, key=lambda name: (order[name], name))
        rows.append((f"`{each.name}`", _links("rules", rules), _links("interventions", tried)))
    return table(("symptom", "reported by", "treated by, in this order"), rows)


def _symptoms_of(cls: Any) -> list[Symptom]:
    """Return the symptoms of a rule's issues, of the run, of a layer and of a head."""
    if not hasattr(cls, "symptom_of"):
        return []
    places: list[tuple[str | None, int | None]] = [(None, None), ("layer", None), ("layer", 0)]
    issues = [StabilityIssue(1, *at, rule_name(cls), "error", 1.0, 1.0, "") for at in places]
    return [each for issue in issues if (each := cls.symptom_of(issue)) is not None]


def _links(page: str, names: list[str]) -> str:
    return ", ".join(f"[`{name}`](reference/{page}.md#{name})" for name in names) or "–"
