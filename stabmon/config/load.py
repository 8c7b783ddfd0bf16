"""Read a monitor's settings from presets, YAML files and keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from stabmon._settings import Layer, SettingsError, read, settings_of, yaml_layers
from stabmon._settings.limits import nearest
from stabmon.config.schema import StabilityConfig
from stabmon.interventions import Intervention


def presets() -> list[str]:
    """Return the names of the presets that come with the package.

    Returns:
        The names, in alphabetical order.

    Example:
        >>> presets()
        ['guard', 'observe']
    """
    return sorted(preset_files())


def load_config(
    config: str | Path | StabilityConfig | None = "observe", **overrides: Any
) -> StabilityConfig:
    """Return the settings of a preset, a YAML file or a config, with arguments laid over them.

    Args:
        config: a preset's name, a YAML file's path, or a :class:`StabilityConfig`; None is
            ``"observe"``. A file holds fields of :class:`StabilityConfig`; its key ``extends``
            names a preset, or a file relative to it, to build on key by key.
        **overrides: fields that replace those of ``config``; None leaves a field as it is.

    Returns:
        The settings.

    Raises:
        ValueError: for an unknown name or key, or a value of the wrong type or size, naming file
            and key.

    Example:
        >>> load_config("observe", log_every=10).log_every
        10
        >>> try:
        ...     load_config("observe", cooldown=-1)
        ... except ValueError as error:
        ...     print(error)
        argument: cooldown: -1 must be a whole number of at least 0
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    arguments = Layer(given, "argument", replaces=True)
    if isinstance(config, StabilityConfig):
        return read(StabilityConfig, Layer(settings_of(config), "config"), arguments)
    name, known = str(config or "observe"), preset_files()
    is_file = Path(name).suffix in {".yaml", ".yml"} or Path(name).is_file()
    if name not in known and not is_file:
        near = nearest(name, known)
        raise SettingsError(
            f"config {name!r} is neither a preset ({', '.join(presets())}) nor a YAML file"
            f"{f', did you mean {near!r}?' if near else '; give one of these'}"
        )
    return read(StabilityConfig, *yaml_layers(name, known), arguments)


def proposed_interventions(config: StabilityConfig) -> Mapping[str, Intervention]:
    """Return the interventions to choose from when a person asks for one.

    Args:
        config: the monitor's settings.

    Returns:
        Those of ``config``; where it has none, those of the preset ``guard``, which is read on
        first access.

    Example:
        >>> from stabmon.config.schema import StabilityConfig
        >>> "qk_clip" in proposed_interventions(StabilityConfig())
        True
        >>> list(proposed_interventions(StabilityConfig(interventions={"stop": {}})))
        ['stop']
    """
    if config.interventions:
        return config.make_interventions()
    return _OnDemand(lambda: load_config("guard").make_interventions())


class _OnDemand(Mapping[str, Intervention]):
    """A mapping that is made on first access."""

    def __init__(self, make: Callable[[], Mapping[str, Intervention]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, Intervention]:
        return self._make()

    def __getitem__(self, name: str) -> Intervention:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def preset_files() -> dict[str, Traversable]:
    """Return the file of each preset by name."""
    return {
        entry.name.removesuffix(".yaml"): entry
        for entry in (files("stabmon.config") / "presets").iterdir()
        if entry.name.endswith(".yaml")
    }
