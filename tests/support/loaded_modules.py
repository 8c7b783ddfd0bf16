"""Find files of this repository that were loaded under two names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def loaded_twice(modules: Mapping[str, ModuleType]) -> dict[str, list[str]]:
    """Return each file below the root that several modules were made of, with their names."""
    names = defaultdict(list)
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).resolve().is_relative_to(ROOT):
            names[str(Path(file).resolve().relative_to(ROOT))].append(name)
    installed = (".venv", "site-packages")
    return {
        file: sorted(found)
        for file, found in names.items()
        if len(found) > 1 and not file.startswith(installed)
    }
