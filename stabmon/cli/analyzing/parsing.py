"""Numbers, ranges and sizes as users write them."""

from __future__ import annotations

import re


def parsed_numbers(text: str, flag: str) -> list[int]:
    """Read numbers and ranges such as ``0,3,5-7`` or ``-1``.

    Args:
        text: the option's value.
        flag: the option, for the error.

    Returns:
        The numbers in order, each once.

    Raises:
        ValueError: if there is anything else.

    Example:
        >>> parsed_numbers("0,3,5-7", "--heads"), parsed_numbers("-1", "--target")
        ([0, 3, 5, 6, 7], [-1])
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            raise ValueError(f"{flag} {text!r}: give numbers or ranges, such as 0,3,5-7")
        low = int(found[1])
        numbers += range(low, int(found[2]) + 1) if found[2] is not None else [low]
    return list(dict.fromkeys(numbers))


def parsed_size(text: str) -> int | float:
    """Read a cache size: keys, or a share of the prompt.

    Raises:
        ValueError: if it is neither.

    >>> parsed_size("128"), parsed_size("0.25"), parsed_size("25%")
    (128, 0.25, 0.25)
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(
            f"--cache-size {text!r}: give keys, such as 128, or a share of the prompt, such as 0.25"
        ) from None
    if 0 < value < 1:
        return value
    if value >= 1 and value == int(value) and not text.endswith("%"):
        return int(value)
    raise ValueError(
        f"--cache-size {text!r}: give a whole number of keys, or a share between 0 and 1"
    )
