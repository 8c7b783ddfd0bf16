"""Valid JSON that still gives back NaN and ±inf exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ENCODING = (
    "a value that is NaN or infinite is written as null, and the object's top-level field "
    "'nonfinite' maps its JSON pointer (RFC 6901) to 'nan', 'inf' or '-inf'; the field is absent "
    "where all values are finite"
)
"""The rule in words, for meta.json."""

_VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(record: Mapping[str, Any]) -> str:
    """Return a record as one JSON object on one line; floats keep all their digits.

    NumPy arrays and scalars become lists and numbers, tuples and sets lists, keys strings, and
    values without a JSON form (a path, a dtype) their ``str``. A NaN or an infinity follows
    :data:`ENCODING`.

    Example:
        >>> print(dumps({"loss": float("nan"), "h.0": [1.5, float("-inf")]}))
        {"loss": null, "h.0": [1.5, null], "nonfinite": {"/loss": "nan", "/h.0/1": "-inf"}}
    """
    nonfinite: dict[str, str] = {}
    plain = {
        str(key): _plain(value, f"/{_escape(str(key))}", nonfinite) for key, value in record.items()
    }
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return json.dumps(plain, allow_nan=False)


def loads(line: str | bytes) -> dict[str, Any]:
    """Return the object that :func:`dumps` wrote, with its NaN and infinities.

    Raises:
        ValueError: if ``line`` is no JSON object, or ``nonfinite`` points nowhere.

    Example:
        >>> loads('{"loss": null, "nonfinite": {"/loss": "inf"}}')
        {'loss': inf}
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, not {type(record).__name__}")
    for pointer, name in record.pop("nonfinite", {}).items():
        *parents, last = (
            part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]
        )
        place: Any = record
        try:
            for part in parents:
                place = place[int(part) if isinstance(place, list) else part]
            place[int(last) if isinstance(place, list) else last] = _VALUES[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"nonfinite entry {pointer!r}: {name!r} fits nothing in the object"
            ) from error
    return record


def _plain(value: Any, pointer: str, nonfinite: dict[str, str]) -> Any:
    """Return ``value`` in JSON types, and note NaN and infinities in ``nonfinite``."""
    if isinstance(value, np.ndarray):
        listed = value.tolist()
        if value.dtype.kind in "iub" or (value.dtype.kind == "f" and np.isfinite(value).all()):
            return listed
        return _plain(listed, pointer, nonfinite)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        nonfinite[pointer] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return None
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, f"{pointer}/{_escape(str(key))}", nonfinite)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, f"{pointer}/{i}", nonfinite) for i, item in enumerate(value)]
    return str(value)


def _escape(key: str) -> str:
    """Return a key as one part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")
