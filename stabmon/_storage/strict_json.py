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

MOST_DEPTH = 64
"""Lists and objects inside each other; records of stabmon have fewer than 10."""
MOST_DIGITS = 308
"""Characters of a whole number that float64 holds in any case."""
_VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(record: Mapping[str, Any], *, digits: int | None = None) -> str:
    """Return a record as one JSON object on one line.

    NumPy arrays and scalars become lists and numbers, tuples and sets lists, keys strings, and
    values without a JSON form (a path, a dtype) their ``str``. A NaN or an infinity follows
    :data:`ENCODING`.

    Args:
        record: the values.
        digits: significant digits of floats; None for all of them.

    Example:
        >>> print(dumps({"loss": float("nan"), "h.0": [1.5, float("-inf")]}))
        {"loss": null, "h.0": [1.5, null], "nonfinite": {"/loss": "nan", "/h.0/1": "-inf"}}
        >>> print(dumps({"loss": 2 / 3, "h.0": np.array([1.0, 1 / 3])}, digits=8))
        {"loss": 0.66666667, "h.0": [1,0.33333333]}
    """
    nonfinite: dict[str, str] = {}
    if digits is not None:
        return _compact(record, digits)
    plain = {
        str(key): _plain(value, f"/{_escape(str(key))}", nonfinite) for key, value in record.items()
    }
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return json.dumps(plain, allow_nan=False)


def _compact(record: Mapping[str, Any], digits: int) -> str:
    nonfinite: dict[str, str] = {}
    number = f"%.{digits}g"

    def text(value: Any, pointer: str) -> str:
        if isinstance(value, np.ndarray):
            if value.ndim == 1 and value.dtype.kind == "f" and np.isfinite(value).all():
                # one format of all values: a tenth of the time of one each
                return f"[{','.join([number] * len(value)) % tuple(value.tolist())}]"
            value = value.tolist()
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and math.isfinite(value):
            return repr(float(number % value))
        if isinstance(value, Mapping):
            return f"{{{', '.join(entries(value, pointer))}}}"
        if isinstance(value, (list, tuple, set, frozenset)):
            return f"[{','.join(text(each, f'{pointer}/{i}') for i, each in enumerate(value))}]"
        return json.dumps(_plain(value, pointer, nonfinite))

    def entries(values: Mapping[str, Any], pointer: str) -> list[str]:
        return [
            f"{json.dumps(str(key))}: {text(value, f'{pointer}/{_escape(str(key))}')}"
            for key, value in values.items()
        ]

    found = entries(record, "")
    if nonfinite:
        found.append(f'"nonfinite": {json.dumps(nonfinite)}')
    return f"{{{', '.join(found)}}}"


def loads(line: str | bytes) -> dict[str, Any]:
    """Return the object that :func:`dumps` wrote, with its NaN and infinities.

    Raises:
        ValueError: if ``line`` is no JSON object, is nested too deep, has a whole number that
            float64 does not hold, or ``nonfinite`` points nowhere.

    Example:
        >>> loads('{"loss": null, "nonfinite": {"/loss": "inf"}}')
        {'loss': inf}
    """
    if _depth(line) > MOST_DEPTH:
        raise ValueError(f"the JSON object is nested more than {MOST_DEPTH} deep")
    try:
        record = json.loads(line, parse_int=_whole)
        if (b"\\u" if isinstance(line, bytes) else "\\u") in line:  # type: ignore[operator]
            record = _encodable(record)
    except RecursionError:
        raise ValueError("the JSON object is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, not {type(record).__name__}")
    nonfinite = record.pop("nonfinite", {})
    if not isinstance(nonfinite, dict):
        raise ValueError(f"nonfinite is a {type(nonfinite).__name__}, not an object")
    for pointer, name in nonfinite.items():
        *parents, last = (
            part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]
        )
        place: Any = record
        try:
            for part in parents:
                place = place[int(part) if isinstance(place, list) else part]
            place[int(last) if isinstance(place, list) else last] = _VALUES[name]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"nonfinite entry {pointer!r}: {name!r} fits nothing in the object"
            ) from error
    return record


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"{text[:20]}… is a whole number of more than {MOST_DIGITS} digits")
    return int(text)


def _depth(line: str | bytes) -> int:
    """Return the number of brackets that are open at once, those in text included."""
    raw = np.frombuffer(line.encode() if isinstance(line, str) else line, dtype=np.uint8)
    opened = (raw == ord("[")) | (raw == ord("{"))
    if np.count_nonzero(opened) <= MOST_DEPTH:
        return 0
    closed = (raw == ord("]")) | (raw == ord("}"))
    return int(np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int32).max())


def _encodable(value: Any) -> Any:
    """Return a value with text that UTF-8 can encode: half a surrogate pair becomes ``?``."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, list) else value


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
