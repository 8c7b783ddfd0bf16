"""Words for the values that an annotation allows."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from stabmon._settings.layers import Reads
from stabmon._settings.limits import Limit


def describe(hint: Any) -> str:
    """Return the words for the values that an annotation allows.

    Example:
        >>> describe(int | None)
        'a whole number or null'
    """
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if own := [each.describe() for each in args[1:] if isinstance(each, Reads)]:
            return own[0]
        text, optional = re.subn(" or null$", "", describe(args[0]))
        for limit in args[1:]:
            text = limit.describe(text) if isinstance(limit, Limit) else text
        return f"{text} or null" if optional else text
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}, {', '.join(map(describe, args))}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {describe(args[0])}"
    if dataclasses.is_dataclass(hint) or origin is not None:
        return "keys and values"
    return words.get(hint) or f"a {hint.__name__}"
