"""Read layers of mappings into dataclasses, as the annotations of their fields say.

A layer is one source of settings: a preset, a YAML file, a word of the command line, keyword
arguments. Later layers win, key by key. Each message is one line with the source and the key.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stabmon._settings.layers import (
    Layer,
    Misfit,
    Reads,
    by_key,
    dotted,
    mappings,
    shortened,
)
from stabmon._settings.limits import Known, Limit, suggest
from stabmon._settings.renamed import current_names
from stabmon._settings.wording import describe

T = TypeVar("T")

NOT_A_SETTING: Mapping[str, Any] = types.MappingProxyType({"setting": False})
"""Metadata of a dataclass field that no configuration sets."""
YAML_TEXT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers such as 1e-3, which YAML 1.1 reads as text because they have no point."""


def read(cls: type[T], *layers: Layer, key: str = "", base: T | None = None) -> T:
    """Return an instance of the dataclass ``cls`` with the values of ``layers``.

    Args:
        cls: dataclass whose annotations are the types, with :mod:`~stabmon._settings.limits`.
        layers: sources of settings, later ones over earlier ones.
        key: dotted key of the whole, for messages.
        base: instance with the values of keys that no layer has; None for the field's defaults.

    Raises:
        SettingsError: for an unknown or missing key, or a value of the wrong type or size.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Training:
        ...     steps: int = 400
        >>> read(Training, Layer({"steps": 5}, "mine.yaml"))
        Training(steps=5)
        >>> read(Training, Layer({"steps": "many"}, "mine.yaml"))
        Traceback (most recent call last):
        stabmon._settings.layers.SettingsError: mine.yaml: steps: 'many' must be a whole number
    """
    values = read_values(cls, layers, key, base)
    try:
        made: T = cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise layers[-1].error(key, str(error)) from None
    return made


def check(instance: Any, source: str = "", key: str = "") -> None:
    """Check every setting of a dataclass instance, and convert it to its declared type.

    For ``__post_init__``, so that an instance made by hand is held to the same limits.

    Raises:
        SettingsError: for a value of the wrong type or size.
    """
    for name, hint in setting_hints(instance.__class__).items():
        layer = Layer(getattr(instance, name), source)
        object.__setattr__(instance, name, convert(hint, [layer], dotted(key, name)))


def setting_names(cls: Any) -> list[str]:
    """Return the names of a dataclass's settings, in order."""
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.metadata.get("setting", True) is not False
    ]


def settings_of(instance: Any) -> dict[str, Any]:
    """Return the settings of a dataclass instance by name."""
    return {name: getattr(instance, name) for name in setting_names(instance)}


@cache
def setting_hints(cls: type) -> dict[str, Any]:
    """Return the annotation of each setting of a dataclass.

    A class whose annotations name what exists only for type checkers is not checked: Any.
    """
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError:
        hints = {}
    return {name: hints.get(name, Any) for name in setting_names(cls)}


def read_values(
    cls: type, layers: Sequence[Layer], key: str = "", base: Any = None
) -> dict[str, Any]:
    """Return the settings of ``cls`` that the layers name, converted; see :func:`read`."""
    hints = setting_hints(cls)
    found = by_key([_with_current_names(cls, layer, key) for layer in layers])
    defaults = {f.name: _default(f) for f in dataclasses.fields(cls)}
    for name, given in found.items():
        if name not in hints:
            raise given[-1].error(dotted(key, name), f"unknown key{suggest(name, hints)}")
    for name, hint in hints.items():
        if base is None and name not in found and defaults[name] is dataclasses.MISSING:
            raise layers[0].error(dotted(key, name), f"missing, must be {describe(hint)}")
    return {
        name: convert(
            hints[name],
            given,
            dotted(key, name),
            defaults.get(name) if base is None else getattr(base, name),
        )
        for name, given in found.items()
    }


def convert(hint: Any, layers: Sequence[Layer], key: str, default: Any = None) -> Any:
    """Return the newest value of ``layers`` as the annotation ``hint`` says.

    Args:
        hint: a type annotation.
        layers: values of one key, newest last; mappings among them are read together.
        key: dotted key, for messages.
        default: the field's default, which a nested dataclass that is given in part builds on.

    Raises:
        SettingsError: for a value that does not fit.
    """
    try:
        return _convert(hint, layers, key, default)
    except Misfit:
        raise layers[-1].error(
            key, f"{shortened(layers[-1].value)} must be {describe(hint)}"
        ) from None


def _convert(hint: Any, layers: Sequence[Layer], key: str, default: Any) -> Any:
    value, origin, args = layers[-1].value, get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _limited(args[0], args[1:], layers, key, default)
    if origin in (Union, types.UnionType):
        return _first_that_fits(args, layers, key, default)
    if origin is Literal:
        if any(value == each and type(value) is type(each) for each in args):
            return value
        raise Misfit
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise Misfit
        base = default if isinstance(default, hint) else None
        return read(hint, *mappings(layers), key=key, base=base)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise Misfit
        found = by_key(mappings(layers))
        return {name: convert(args[1], each, dotted(key, name)) for name, each in found.items()}
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _listed(origin, args, layers[-1], key)
    return _plain(hint, value)


def _plain(kind: Any, value: Any) -> Any:
    """Return a value of a type without parts."""
    if value is None and kind is type(None):
        return None
    if kind is float and isinstance(value, str) and YAML_TEXT.fullmatch(value):
        return float(value)
    if isinstance(value, bool):
        if kind is not bool:
            raise Misfit
    elif kind is float and isinstance(value, Real):
        return float(value)
    elif kind is int and isinstance(value, Integral):
        return int(value)
    origin = get_origin(kind) or kind
    if isinstance(origin, type) and not isinstance(value, origin):
        raise Misfit
    return value


def _limited(
    kind: Any, extras: Sequence[Any], layers: Sequence[Layer], key: str, default: Any
) -> Any:
    """Return a value within the limits of its annotation."""
    for extra in extras:
        if isinstance(extra, Reads):
            return extra.read(layers, key)
    value = _convert(kind, layers, key, default)
    if value is None:
        return None
    for extra in extras:
        if isinstance(extra, Known) and not extra.allows(value):
            hint = suggest(str(value), extra.names)
            raise layers[-1].error(key, f"unknown {extra.kind} {value!r}{hint}")
        if isinstance(extra, Limit) and not extra.allows(value):
            raise Misfit
    return value


def _first_that_fits(
    options: Sequence[Any], layers: Sequence[Layer], key: str, default: Any
) -> Any:
    """Return the value as the first type of a union that it fits."""
    for option in options:
        try:
            return _convert(option, layers, key, default)
        except Misfit:
            continue
    raise Misfit


def _listed(origin: Any, args: Sequence[Any], layer: Layer, key: str) -> Any:
    """Return a list or tuple whose entries fit."""
    value = layer.value
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise Misfit
    fixed = origin is tuple and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise Misfit
    kinds = args if fixed else [args[0]] * len(value)
    found = [
        convert(kind, [Layer(each, layer.source)], f"{key}[{at}]")
        for at, (kind, each) in enumerate(zip(kinds, value, strict=True))
    ]
    return tuple(found) if origin is tuple or isinstance(value, tuple) else found


def _with_current_names(cls: type, layer: Layer, key: str) -> Layer:
    """Return a layer whose keys have the names that the settings of ``cls`` have now."""
    if not isinstance(layer.value, Mapping):
        raise layer.error(key, f"{shortened(layer.value)} must be keys and values")
    names = current_names(cls, layer.value, lambda text: layer.error(key, text))
    return dataclasses.replace(layer, value=names)


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default
