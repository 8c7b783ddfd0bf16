"""Words for the values that the annotation of a setting allows."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def describe(hint: Any) -> str:
    """Return the words for an annotation, with the bounds that it declares.

    Args:
        hint: a type, which may be ``Annotated`` with limits that describe themselves: by
            ``describe(kind)`` for a limit on a kind of value, or ``describe()`` for the whole.

    Example:
        >>> describe(int | None), describe(Sequence[str])
        ('a whole number or null', 'a list, each text')
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _limited(args[0], args[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "keys and values"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {describe(args[0])}"
    return PLAIN.get(hint) or getattr(hint, "__name__", "any")


def _limited(hint: Any, limits: Sequence[Any]) -> str:
    """Return the words for an annotation within its limits."""
    text = describe(hint)
    for limit in limits:
        if not hasattr(limit, "describe"):
            continue
        if not inspect.signature(limit.describe).parameters:
            return str(limit.describe())
        text = limit.describe(text)
    return text
