"""Annotations of settings that belong to another dataclass, or to the classes of a registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabmon._settings.layers import Layer, Misfit, Reads, by_key, dotted, mappings, shortened
from stabmon._settings.limits import suggest
from stabmon._settings.reader import read, read_values


@dataclass(frozen=True, eq=False)
class ByName(Reads):
    """Names of a registry, each with settings of its class, true or false.

    The value read is again plain: a mapping of names to mappings, true, false or None, with the
    current names of all settings.
    """

    registry: Any
    """A :class:`~stabmon.registry.Registry` of dataclasses."""

    def read(self, layers: Sequence[Layer], key: str) -> dict[str, Any]:
        if not isinstance(layers[-1].value, Mapping):
            raise Misfit
        found = by_key(mappings(layers))
        return {name: self._one(name, given, dotted(key, name)) for name, given in found.items()}

    def describe(self) -> str:
        return f"a mapping of {self.registry.kind}s to settings, true or false"

    def make(self, values: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return an instance of each class that ``values`` names and does not set to false.

        Raises:
            SettingsError: for an unknown name or setting, or a value that does not fit.
        """
        plain = self.read([Layer(values, "")], key)
        return {
            name: self.registry[name](**(given if isinstance(given, Mapping) else {}))
            for name, given in plain.items()
            if given is not False
        }

    def _one(self, name: str, layers: Sequence[Layer], key: str) -> Any:
        newest = layers[-1]
        if name not in self.registry:
            hint = suggest(name, self.registry)
            raise newest.error(key, f"unknown {self.registry.kind} {name!r}{hint}")
        if newest.value is None or isinstance(newest.value, bool):
            return newest.value
        if not isinstance(newest.value, Mapping):
            raise newest.error(
                key, f"{shortened(newest.value)} must map settings to values, or be true or false"
            )
        return given_settings(self.registry[name], mappings(layers), key)


@dataclass(frozen=True, eq=False)
class FieldsOf(Reads):
    """Some settings of another dataclass, kept as a plain mapping under their current names."""

    cls: type

    def read(self, layers: Sequence[Layer], key: str) -> dict[str, Any]:
        if not isinstance(layers[-1].value, Mapping):
            raise Misfit
        return given_settings(self.cls, mappings(layers), key)

    def describe(self) -> str:
        return "keys and values"


def given_settings(cls: type, layers: Sequence[Layer], key: str) -> dict[str, Any]:
    """Return the settings that are given, after an instance of them could be made."""
    values = read_values(cls, layers, key)
    read(cls, Layer(values, layers[-1].source), key=key)
    return values
