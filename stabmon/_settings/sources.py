"""Sources of settings: YAML files that may extend others, and ``key=value`` words."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stabmon._settings.layers import Layer, SettingsError
from stabmon._settings.limits import suggest
from stabmon._settings.reader import read

T = TypeVar("T")

EXTENDS = "extends"
"""Key of a file whose settings lie below those of the file itself: a preset or a path."""


def read_settings(cls: type[T], path: str | Path, words: Sequence[str] = ()) -> T:
    """Return the settings of a YAML file with ``key=value`` words laid over them.

    Args:
        cls: dataclass of the settings; see :func:`~stabmon._settings.reader.read`.
        path: a YAML file; its key ``extends`` may name a file, relative to it, to build on.
        words: such as ``training.steps=50``, from the command line.

    Raises:
        SettingsError: for an unreadable file, an unknown or missing key, or a value of the wrong
            type or size.
    """
    return read(cls, *yaml_layers(path), *word_layers(words))


def word_layers(words: Sequence[str], source: str = "command line") -> list[Layer]:
    """Return a layer for each ``key=value`` word; keys may be dotted, values are YAML.

    Raises:
        SettingsError: for a word of another form.

    Example:
        >>> word_layers(["training.steps=50"])[0].value
        {'training': {'steps': 50}}
    """
    layers = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise SettingsError(f"{source}: {word!r} is not key=value, such as training.steps=50")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SettingsError(f"{source}: {key}: {text!r} is not a YAML value") from None
        for name in reversed(key.split(".")):
            value = {name: value}
        layers.append(Layer(value, source))
    return layers


def yaml_layers(name: str | Path, presets: Mapping[str, Traversable] | None = None) -> list[Layer]:
    """Return the layers of a YAML file: those of the files that it extends, then its own.

    Args:
        name: a preset's name, or the path of a file.
        presets: files that go by a name of their own.

    Raises:
        SettingsError: for a file that cannot be read, is not YAML, or extends itself.
    """
    known = presets or {}
    if str(name) in known:
        return _layers(f"preset {name}", known[str(name)], known, ())
    return _layers(os.path.normpath(name), Path(name), known, ())


def _layers(
    source: str, file: Traversable, presets: Mapping[str, Traversable], above: tuple[str, ...]
) -> list[Layer]:
    """Return a file's layers; ``above`` are the sources that lead to it."""
    if source in above:
        raise SettingsError(
            f"{above[0]}: {EXTENDS}: {' -> '.join((*above, source))} goes round in a circle"
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{source}: {error.strerror or error}; name a YAML file that can be read"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source}: not valid YAML, {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: holds a {type(values).__name__}, must map keys to values")
    if EXTENDS not in values:
        return [Layer(values, source)]
    own = {key: value for key, value in values.items() if key != EXTENDS}
    label, base = _base(source, file, values[EXTENDS], presets)
    return [*_layers(label, base, presets, (*above, source)), Layer(own, source)]


def _base(
    source: str, file: Traversable, named: Any, presets: Mapping[str, Traversable]
) -> tuple[str, Traversable]:
    """Return the source and the file that ``extends`` names."""
    if isinstance(named, str):
        if named in presets:
            return f"preset {named}", presets[named]
        if isinstance(file, Path) and named.endswith((".yaml", ".yml")):
            path = Path(os.path.normpath(file.parent / named))
            return str(path), path
    kinds = "a preset or a path that ends in .yaml" if presets else "a path that ends in .yaml"
    hint = suggest(str(named), presets) if presets else ""
    raise SettingsError(f"{source}: {EXTENDS}: {named!r} must be {kinds}{hint}")
