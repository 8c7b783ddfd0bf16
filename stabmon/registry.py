"""Find signals, rules, interventions, controllers and sinks by name.

A decorator registers what lives in-tree; an entry point in the group ``stabmon.<kind>`` registers
what lives in other people's packages. A second entry of the same name is an error, not a silent
replacement.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind, for example every signal.

    >>> sinks = Registry[type]("sink", package=None)
    >>> sinks.register("null", int)
    >>> sinks["null"]
    <class 'int'>
    >>> sinks["nul"]
    Traceback (most recent call last):
    ValueError: unknown sink 'nul', did you mean 'null'? Known: null
    """

    def __init__(self, kind: str, package: str | None) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, entry: T) -> None:
        """Add ``entry`` under ``name``.

        Raises:
            ValueError: if another entry has that name.
        """
        known = self._entries.get(name)
        if known is not None and entry in (known, getattr(known, "function", None)):
            return  # a decorator made the entry of this function already
        if known is not None:
            raise ValueError(
                f"{self.kind} {name!r} is registered twice, by {known!r} and {entry!r}: rename one"
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"unknown {self.kind} {name!r}{hint} Known: {', '.join(sorted(self._entries))}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, entry) in the order of names."""
        return ((name, self._entries[name]) for name in self)

    def _load(self) -> None:
        """Import every module of the kind's package, then the entry points of other packages,
        once.
        """
        if self._loaded or self._package is None:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=f"stabmon.{self.kind}s"):
            self.register(point.name, point.load())
