"""Signals, rules, interventions, controllers and sinks by name.

A decorator registers an entry of this package; an entry point in the group ``stabmon.<kind>s``
registers one of another package. A second entry of the same name is refused, never a silent
replacement.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")
logger = logging.getLogger("stabmon")


class Registry(Generic[T]):
    """Entries of one kind by name, for example every signal.

    All modules directly in the kind's package are imported at the first question, then the entry
    points of other packages. An entry point that cannot be imported, or whose name is taken, is
    logged once and left out.

    Args:
        kind: the kind in the singular, for messages and the entry points' group.
        package: the package whose modules register the entries; None for none.

    Example:
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
        self._unusable: dict[str, str] = {}
        """Message by name of each entry point that was left out."""
        self._loaded = False

    def register(self, name: str, entry: T) -> None:
        """Add ``entry`` under ``name``.

        Args:
            name: the name in configurations and lists.
            entry: a function, class or record of this kind.

        Raises:
            ValueError: if another entry has that name.
        """
        known = self._entries.get(name)
        if known is not None and _made_of(entry, known):
            return  # a decorator made the entry of this function already
        if known is not None:
            raise ValueError(
                f"{self.kind} {name!r} is registered twice, by {known!r} and {entry!r}: rename one"
            )
        self._entries[name] = entry

    @contextlib.contextmanager
    def temporarily(self, name: str, entry: T) -> Iterator[None]:
        """Register ``entry`` on entering the context and take it out on leaving.

        Args:
            name: a name that no entry has.
            entry: as for :meth:`register`.

        Raises:
            ValueError: if the name is taken.

        Example:
            >>> sinks = Registry[type]("sink", package=None)
            >>> with sinks.temporarily("null", int):
            ...     list(sinks)
            ['null']
            >>> list(sinks)
            []
        """
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered already: use another name")
        self.register(name, entry)
        try:
            yield
        finally:
            del self._entries[name]

    def __getitem__(self, name: str) -> T:
        self._load()
        if name in self._entries:
            return self._entries[name]
        if name in self._unusable:
            raise ValueError(self._unusable[name])
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown {self.kind} {name!r}{hint} Known: {', '.join(sorted(self._entries))}"
        )

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def items(self) -> Iterator[tuple[str, T]]:
        """Iterate over (name, entry) in the order of names."""
        return ((name, self._entries[name]) for name in self)

    def _load(self) -> None:
        """Import all modules of the kind's package and all entry points, once."""
        from importlib.metadata import entry_points

        if self._loaded or self._package is None:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.ispkg:
                importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=f"stabmon.{self.kind}s"):
            self._load_entry_point(point)

    def _load_entry_point(self, point: EntryPoint) -> None:
        """Register an entry point; log it and leave it out where that fails."""
        try:
            entry = point.load()
            names = {name for name, known in self._entries.items() if _made_of(entry, known)}
            if names - {point.name}:
                raise ValueError(f"its decorator registers it as {min(names)!r}: name it so")
            self.register(point.name, entry)
        except Exception as error:
            owner = point.value if point.dist is None else point.dist.name
            message = (
                f"{self.kind} {point.name!r} of the package {owner} cannot be used "
                f"({type(error).__name__}: {error}): update or uninstall that package"
            )
            self._unusable[point.name] = message
            logger.warning("%s. It is left out.", message)


def _made_of(entry: object, known: object) -> bool:
    """Return whether an entry is a registered one, or the function that a decorator made it of."""
    return entry in (known, getattr(known, "function", None))
