"""Layers of settings: one source each, later ones over earlier ones, key by key."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class SettingsError(ValueError):
    """A wrong setting; the message is one line with the source, the key and the remedy."""


class Misfit(Exception):
    """A value does not have the type, or is not within the limits, of its annotation."""


@dataclass(frozen=True)
class Layer:
    """One source of settings.

    Args:
        value: usually a mapping of keys to values.
        source: name of the source in messages; ``--`` for options of a command.
        replaces: whether mappings in it replace those of earlier layers instead of adding to them.
    """

    value: Any
    source: str
    replaces: bool = False

    def error(self, key: str, text: str) -> SettingsError:
        """Return the error for ``key`` in this source."""
        if self.source == "--":
            return SettingsError(f"--{key.replace('_', '-')}: {text}")
        return SettingsError(": ".join(part for part in (self.source, key, text) if part))


class Reads(ABC):
    """An annotation that reads the layers of its field by itself."""

    @abstractmethod
    def read(self, layers: Sequence[Layer], key: str) -> Any:
        """Return the field's value.

        Raises:
            SettingsError: for a value that does not fit.
            Misfit: if the newest value is not of the right type at all.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return the words for a value of the right type."""


def mappings(layers: Sequence[Layer]) -> list[Layer]:
    """Return the newest layers that are mappings, from the last one that replaces the others."""
    found: list[Layer] = []
    for layer in reversed(layers):
        if not isinstance(layer.value, Mapping):
            break
        found.insert(0, layer)
        if layer.replaces:
            break
    return found


def by_key(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return the layers of each key of mappings."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        for name, value in layer.value.items():
            found.setdefault(str(name), []).append(dataclasses.replace(layer, value=value))
    return found


def dotted(key: str, name: str) -> str:
    """Return the key of a part."""
    return f"{key}.{name}" if key else name


def shortened(value: Any) -> str:
    """Return a value's repr on one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
