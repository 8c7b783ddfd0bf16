"""The codec of records: plain values, and back by the types of the fields."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import numpy as np

from stabmon._storage.stored_value import Stored


class PlainRecord:
    """Base of dataclasses stored and written as plain values, one per field.

    Example:
        >>> from stabmon.records import QKUpdate
        >>> QKUpdate(0.5, 2.0, 0.25).to_dict()
        {'gradient': 0.5, 'weight': 2.0, 'update': 0.25}
        >>> QKUpdate.from_dict({"gradient": 0.5, "weight": "heavy"})
        Traceback (most recent call last):
        ValueError: weight is 'heavy', not a number
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values: records in it as mappings, tuples as lists.

        Arrays stay arrays; :func:`stabmon._storage.strict_json.dumps` writes them as lists.
        """
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | Stored, **given: Any) -> Self:
        """Return the record that :meth:`to_dict` gave.

        Args:
            values: plain values; an entry that is no field is ignored, and a missing one takes the
                field's default.
            given: fields that are stored elsewhere; they win over ``values``.

        Raises:
            ValueError: naming the entry that is missing or of another type than its field.
        """
        saved = Stored.of(values)
        present, types = saved.mapping(), _types(cls)
        for field in fields(cls):  # type: ignore[arg-type]
            if field.name in given:
                continue
            optional = field.default is not MISSING or field.default_factory is not MISSING
            if field.name in present or not optional:
                given[field.name] = _read(types[field.name], saved[field.name])
        return cls(**given)


_types: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def _plain(value: Any) -> Any:
    if isinstance(value, PlainRecord):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _read(kind: Any, saved: Stored) -> Any:
    """Return a stored value as one of type ``kind``."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind](saved)
    if NoneType in inner:
        return saved.maybe(lambda each: _read(inner[0], each))
    if origin is Literal:
        return saved.one_of(inner)
    if origin is Mapping:
        return {name: _read(inner[1], each) for name, each in saved.items()}
    if origin is tuple:
        items = saved.parts(None if Ellipsis in inner else len(inner))
        kinds = inner[:1] * len(items) if Ellipsis in inner else inner
        return tuple(_read(each, item) for each, item in zip(kinds, items, strict=True))
    if kind is np.ndarray:
        return saved.array()
    return kind.from_dict(saved)


_SCALARS: dict[Any, Any] = {
    int: Stored.integer,
    float: Stored.number,
    str: Stored.text,
    bool: Stored.flag,
    Any: lambda saved: saved.value,
}
