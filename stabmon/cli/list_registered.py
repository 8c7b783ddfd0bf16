"""The command ``stabmon list``."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated

import typer

from stabmon.cli.options import Json
from stabmon.registry import Registry

KINDS = {
    "signals": "stabmon.signals:SIGNALS",
    "rules": "stabmon.rules:RULES",
    "interventions": "stabmon.interventions:INTERVENTIONS",
    "controllers": "stabmon.controllers:CONTROLLERS",
    "sinks": "stabmon.sinks:SINKS",
    "evictions": "stabmon.analysis.kv_cache:POLICIES",
}
"""Kind of entry -> its registry."""


def list_registered(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(KINDS)}; all if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List signals, rules, interventions, controllers, sinks, evictions."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}. Known: {', '.join(KINDS)}")
    found = {name: dict(_entries(name)) for name in KINDS if kind in (None, name)}
    if as_json:
        print(json.dumps(found))
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n\n".join("\n".join(_lines(name, each, columns)) for name, each in found.items()))


def plain(line: str) -> str:
    r"""Write a docstring's line without markup.

    Example:
        >>> plain(r"Clip :math:`\max_j |z_j|` of a :class:`~stabmon.Reading` to ``cap``.")
        'Clip max_j |z_j| of a Reading to cap.'
    """
    line = re.sub(r":(?:\w+:)+`~(?:\w+\.)*([^`]*)`", r"\1", line)
    line = re.sub(r":(?:\w+:)+`([^`]*)`", r"\1", line).replace("`", "")
    line = re.sub(r"\\(?:mathrm|mathbf|text|operatorname)\{([^}]*)\}", r"\1", line)
    return re.sub(r"\\[,;!]|[\\$]", "", line)


def _entries(kind: str) -> Iterator[tuple[str, str]]:
    """Yield name and first docstring line of every entry."""
    module, _, name = KINDS[kind].partition(":")
    registry: Registry[object] = getattr(import_module(module), name)
    for entry, leaf in registry.items():
        doc = inspect.getdoc(getattr(leaf, "function", leaf)) or ""
        yield entry, plain(doc.partition("\n")[0])


def _lines(kind: str, entries: dict[str, str], columns: int | None) -> Iterator[str]:
    """Yield a heading and a line for each entry, cut to the width of a terminal."""
    width = max(map(len, entries), default=0)
    yield kind
    for name, words in entries.items():
        line = f"  {name:<{width}}  {words}"
        yield line if columns is None or len(line) <= columns else f"{line[: columns - 1]}…"
