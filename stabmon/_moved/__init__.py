"""Keep the import paths of the last release working, with a warning that names the new ones.

A finder on ``sys.meta_path`` answers for modules of :data:`~stabmon._moved.table.MODULES` alone. An
old module warns once when it is imported, and takes its names from the new ones. Delete this folder,
and the lines that call it, with the next release.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from stabmon._moved.table import MODULES, NAMES


def install() -> None:
    """Let the import system find moved modules; may be called twice."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        # first, since a folder left over from the last release would be found as a namespace package
        sys.meta_path.insert(0, MovedModules())


def moved_names(module: str, *targets: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose old names are now in other modules.

    Args:
        module: the module's name.
        targets: the modules that hold them now, below ``stabmon``.
    """

    def find(name: str) -> Any:
        new = NAMES.get(name, name)
        for target in () if name.startswith("__") else targets:
            found = vars(importlib.import_module(f"stabmon.{target}"))
            if new in found and not isinstance(found[new], ModuleType):
                _warn(f"{module}.{name}", f"stabmon.{target}.{new}", stacklevel=2)
                return found[new]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


class MovedModules:
    """Finder and loader of modules under their old names.

    Not of ``importlib.abc``, which loads a third of what importing stabmon loads.
    """

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of the module to the import system."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a moved module; None for every other name."""
        name = fullname.removeprefix("stabmon.")
        if name == fullname or name not in MODULES:
            return None
        is_package = any(each.startswith(f"{name}.") for each in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)  # type: ignore[arg-type]

    def exec_module(self, module: ModuleType) -> None:
        """Fill an old module with the names of the new ones, and warn."""
        targets = [f"stabmon.{each}" for each in MODULES[module.__name__.removeprefix("stabmon.")]]
        _warn(module.__name__, targets[0], stacklevel=2)
        found = [importlib.import_module(each) for each in reversed(targets)]
        for each in found:
            for name, value in vars(each).items():
                if not name.startswith("__"):
                    setattr(module, name, value)
        for old, new in NAMES.items():
            if hasattr(module, new):
                setattr(module, old, getattr(module, new))
        parent, _, leaf = module.__name__.rpartition(".")
        function = vars(sys.modules[parent]).get(leaf)
        if callable(function):
            # importing a submodule sets it on its package, where a function has the same name
            kind = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
            module.__class__ = kind


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{old} has moved to {new}; the old path goes with the next release",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )
