"""The page of the public Python names."""

from __future__ import annotations

import importlib
import inspect

PARTS = {
    "stabmon": "The monitor and its records.",
    "stabmon.integrations.transformers": "For Hugging Face's Trainer.",
    "stabmon.integrations.lightning": "For Lightning's Trainer.",
    "stabmon.sinks.reader": "Records read back.",
    "stabmon.operator": "Attention as an operator that is never formed.",
    "stabmon.controllers": "Controllers: see [the guide](../controllers.md).",
    "stabmon.analysis": "Analysis: see [the guide](../analysis.md).",
}
"""Modules with public names, and what they are for."""
NAMED = {
    "stabmon.integrations.transformers": ["stabmon.integrations.transformers.StabilityCallback"],
    "stabmon.integrations.lightning": ["stabmon.integrations.lightning.StabilityCallback"],
    "stabmon.sinks.reader": ["stabmon.sinks.reader.Records"],
}
"""Paths of modules without ``__all__``, or that are slow to import."""
ELSEWHERE = {"stabmon.controllers.base.Controller"}
"""Objects that another page of the reference documents."""


def page() -> str:
    """Return the page."""
    parts = ["# Python\n", "Leaves of each kind have pages of their own.\n"]
    seen = set(ELSEWHERE)
    for module, words in PARTS.items():
        parts.append(f"## {module} {{#{module.replace('.', '-')}}}\n\n{words}\n")
        for path in NAMED.get(module) or _exported(module):
            if path not in seen:
                seen.add(path)
                parts.append(f"::: {path}\n    options:\n      heading_level: 3\n")
    return "\n".join(parts)


def _exported(module: str) -> list[str]:
    """Return where each class and function that a module exports is defined."""
    loaded = importlib.import_module(module)
    found = [getattr(loaded, name) for name in sorted(loaded.__all__)]
    return [
        f"{each.__module__}.{each.__qualname__}"
        for each in found
        if inspect.isclass(each) or inspect.isfunction(each)
    ]
