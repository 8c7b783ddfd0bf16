"""The command ``stabmon list``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from stabmon.cli.options import Json
from stabmon.registry import Registry


def list_registered(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="signals, rules, interventions, controllers, sinks or evictions; all if left out."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List all registered signals, rules, interventions, controllers, sinks and evictions."""
    registries = _registries()
    if kind is not None and kind not in registries:
        raise ValueError(f"unknown kind {kind!r}. Known: {', '.join(registries)}")
    chosen = {name: registry for name, registry in registries.items() if kind in (None, name)}
    if as_json:
        print(json.dumps({name: dict(_entries(registry)) for name, registry in chosen.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    for name, registry in chosen.items():
        table = Table(title=name, title_justify="left", box=None, show_header=False, padding=(0, 2))
        for entry, line in _entries(registry):
            table.add_row(entry, line)
        Console().print(table)


def _registries() -> dict[str, Registry[Any]]:
    from stabmon.analysis.kv_cache import POLICIES
    from stabmon.controllers import CONTROLLERS
    from stabmon.interventions import INTERVENTIONS
    from stabmon.rules import RULES
    from stabmon.signals import SIGNALS
    from stabmon.sinks import SINKS

    return {
        "signals": SIGNALS,
        "rules": RULES,
        "interventions": INTERVENTIONS,
        "controllers": CONTROLLERS,
        "sinks": SINKS,
        "evictions": POLICIES,
    }


def _entries(registry: Registry[Any]) -> Iterator[tuple[str, str]]:
    """Yield name and first docstring line of every entry."""
    for name, entry in registry.items():
        yield name, (inspect.getdoc(getattr(entry, "function", entry)) or "").split("\n")[0]
