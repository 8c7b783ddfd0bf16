"""Settings of a run: a YAML file, then ``key=value`` from the command line, checked against
dataclasses.

Every error is one line that names the file, or the command line, and the dotted key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

S = TypeVar("S")


class SettingsError(ValueError):
    """A setting is wrong; the message is one line and names where, what and the mend."""


@dataclass(frozen=True)
class CorpusSettings:
    """See ``corpus.load_corpus``."""

    text: str | None = None
    block: int = 128
    validation_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast. AdamW with betas 0.9 and 0.95; linear warm-up, then a cosine down to a
    tenth of the rate.
    """

    steps: int = 400
    batch: int = 8
    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest global norm of the gradient."""
    validate_every: int | None = None
    """Steps between validations; None for one at the end alone."""
    save_every: int | None = None
    """Steps between checkpoints; None for one at the end alone."""
    threads: int | None = None
    """CPU threads; None for PyTorch's choice. Losses are compared bit for bit only at the same
    number.
    """


@dataclass(frozen=True)
class WatchSettings:
    """What is handed to stabmon; anything else of its configuration goes into a file named by
    ``config``.
    """

    config: str = "observe"
    log_every: int = 10


def read_settings(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings in ``path`` with ``overrides`` such as ``training.steps=50`` laid over them.

    Raises:
        SettingsError: for an unreadable file, an unknown or missing key, or a value of the wrong
            type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SettingsError(
            f"cannot read {path}: {error.strerror}; name a YAML file such as those in configs/"
        ) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    settings: S = _build(cls, {} if values is None else values, str(path), "")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise SettingsError(
                f"command line: {override!r} is not key=value, such as training.steps=50"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"command line: {key}: {text!r} is not a YAML value") from error
        settings = _replace(settings, key.split("."), value, "")
    return settings


def _replace(settings: Any, keys: Sequence[str], value: Any, prefix: str) -> Any:
    """``settings`` with one value changed, however deep."""
    cls, name = type(settings), keys[0]
    _known(cls, name, "command line", prefix)
    if len(keys) == 1:
        new = _convert(get_type_hints(cls)[name], value, "command line", prefix + name)
    else:
        part = getattr(settings, name)
        if not dataclasses.is_dataclass(part):
            raise SettingsError(
                f"command line: {prefix}{name} is {part!r} and has no {keys[1]!r} to set"
            )
        new = _replace(part, keys[1:], value, f"{prefix}{name}.")
    return dataclasses.replace(settings, **{name: new})


def _build(cls: type[Any], values: Any, source: str, prefix: str) -> Any:
    """One dataclass from one mapping."""
    if not isinstance(values, Mapping):
        raise SettingsError(
            f"{source}: {prefix.removesuffix('.') or 'the file'} must hold keys and values, not "
            f"{values!r}"
        )
    hints = get_type_hints(cls)
    for name in values:
        _known(cls, str(name), source, prefix)
    for f in dataclasses.fields(cls):
        if (
            f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise SettingsError(f"{source}: {prefix}{f.name} is missing")
    return cls(
        **{
            name: _convert(hints[name], value, source, prefix + name)
            for name, value in values.items()
        }
    )


def _known(cls: type[Any], name: str, source: str, prefix: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
        raise SettingsError(f"{source}: unknown key {prefix}{name}: {hint}")


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    """``value`` as the type ``hint``."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind: Any = next(option for option in options if option is not type(None))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, source, f"{key}.")
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is list and isinstance(value, list):
        return [_convert(get_args(kind)[0], item, source, key) for item in value]
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3, without a point, as text
        except (TypeError, ValueError):
            pass
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    raise SettingsError(f"{source}: {key} is {value!r}, but must be {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {_in_words(get_args(hint)[0])}"
    return words.get(hint, str(hint))
