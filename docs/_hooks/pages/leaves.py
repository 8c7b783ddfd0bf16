"""A page for each registry: its entries, their docstrings and their settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from markup import cell, table

from pages.settings import settings_table
from stabmon.analysis.kv_cache import POLICIES
from stabmon.controllers import CONTROLLERS
from stabmon.interventions import INTERVENTIONS, Intervention
from stabmon.registry import Registry
from stabmon.rules import RULES, Rule
from stabmon.signals import SIGNALS, Signal
from stabmon.sinks import SINKS

ALONE = {"show_root_heading": "false", "members": "false", "show_root_toc_entry": "false"}
"""The docstring by itself."""


@dataclass(frozen=True)
class Kind:
    """A registry and what is said of it."""

    title: str
    registry: Registry[Any]
    intro: str
    base: str
    """Path of what another package subclasses or calls."""
    facts: Callable[[str, Any], Mapping[str, str]] = lambda name, entry: {}
    """Facts of one entry that its class declares."""
    settings: str | None = None
    """Heading of the table of its settings, where entries are dataclasses."""


def pages() -> dict[str, str]:
    """Return the text of each page by its path."""
    return {f"reference/{name}.md": _page(kind) for name, kind in KINDS.items()}


def _page(kind: Kind) -> str:
    rows = [
        (f"[`{name}`](#{name})", cell(_first_line(entry))) for name, entry in kind.registry.items()
    ]
    return "\n".join(
        [
            f"# {kind.title}\n",
            kind.intro,
            table(("name", "in a line"), rows),
            *(_entry(kind, name, entry) for name, entry in kind.registry.items()),
            "## To write your own {#your-own}\n",
            "[Add your own](../extend.md) shows the file to copy.\n",
            f"::: {kind.base}\n    options:\n      heading_level: 3\n"
            "      inherited_members: true\n",
        ]
    )


def _entry(kind: Kind, name: str, entry: Any) -> str:
    facts = "".join(f"- {label}: {value}\n" for label, value in kind.facts(name, entry).items())
    parts = [f"## {name} {{#{name}}}\n", facts, _docstring(entry)]
    if kind.settings is not None:
        parts += [f"**{kind.settings}**\n", settings_table(entry, ("issues", "why"))]
    return "\n".join(parts)


def _docstring(entry: Any) -> str:
    documented = getattr(entry, "function", entry)
    options = "".join(f"      {key}: {value}\n" for key, value in ALONE.items())
    return f"::: {documented.__module__}.{documented.__qualname__}\n    options:\n{options}"


def _first_line(entry: Any) -> str:
    return (inspect.getdoc(getattr(entry, "function", entry)) or "").split("\n\n")[0]


def _of_signal(name: str, entry: Signal) -> Mapping[str, str]:
    least = entry.least_visible
    rows = f"rows that see at least {least} keys" if least > 1 else "rows"
    return {
        "Unit": entry.unit,
        "Value of a head": f"the {entry.reduction} over batch and {rows}",
        "Needs of the operator": ", ".join(f"`{each}`" for each in entry.needs),
    }


def _of_rule(name: str, entry: type[Rule]) -> Mapping[str, str]:
    types = getattr(entry, "issue_types", ()) or (name,)
    symptom = getattr(entry, "symptom", None)
    return {
        "Issue types": ", ".join(f"`{each}`" for each in types),
        "Symptom": "none: no intervention treats it" if symptom is None else f"`{symptom.name}`",
    }


def _of_intervention(name: str, entry: type[Intervention]) -> Mapping[str, str]:
    treats = ", ".join(f"`{each}` (place {place})" for each, place in entry.treats.items())
    flags = {
        "affects the whole run": entry.affects_whole_run,
        "is in place from the first step": entry.install_at_start,
        "is done at once, and not held": entry.once,
        "ends the round of the sample": entry.ends_round,
        "may be repeated for a cause found anew": entry.renews,
    }
    cost = f"{entry.cost:g} nats" if math.isfinite(entry.cost) else "not measured"
    facts = {
        "Treats": treats or "no open alarm",
        "Must come after one of": ", ".join(f"`{each}`" for each in entry.after),
        "Cost to a healthy run": cost,
        "It": ", ".join(words for words, on in flags.items() if on),
    }
    return {label: value for label, value in facts.items() if value}


KINDS = {
    "signals": Kind(
        "Signals",
        SIGNALS,
        "Numbers measured of each attention row, reduced to one per query head. "
        "[What is measured](../concepts.md) has the formulas. `signals:` in the "
        "[settings](settings.md#monitor) chooses among them.\n",
        "stabmon.signals.base.signal",
        _of_signal,
    ),
    "rules": Kind(
        "Rules",
        RULES,
        "Rules read the history of readings and report issues. All are on; `rules:` in the "
        "[settings](settings.md#monitor) sets their levels, or turns one off. "
        "[How an alarm is decided](../alarms.md) says what they have in common.\n",
        "stabmon.rules.base.Rule",
        _of_rule,
        "Levels",
    ),
    "interventions": Kind(
        "Interventions",
        INTERVENTIONS,
        "Changes of a training run, each with an undo. `interventions:` in the "
        "[settings](settings.md#monitor) allows them. [What guard does](../guard.md) says how one "
        "is chosen and judged.\n",
        "stabmon.interventions.base.intervention.Intervention",
        _of_intervention,
        "Settings",
    ),
    "controllers": Kind(
        "Controllers",
        CONTROLLERS,
        "Learned or linear attention for unmodified models: see [Controllers](../controllers.md).\n",
        "stabmon.controllers.base.Controller",
    ),
    "sinks": Kind(
        "Sinks",
        SINKS,
        "Places that records are written to: see [Records and dashboards](../records.md).\n",
        "stabmon.sinks.base.Sink",
    ),
    "evictions": Kind(
        "Cache policies",
        POLICIES,
        "Rules by which a KV cache keeps keys: see [Analysis](../analysis.md).\n",
        "stabmon.analysis.kv_cache.policy.Policy",
    ),
}
