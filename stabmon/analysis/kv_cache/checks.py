"""Refuse parameters out of range in one line that names the value and the mend."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
) -> None:
    """Refuse a number outside its range.

    Raises:
        ValueError: naming the range.

    Example:
        >>> check_number("tau1", -1.0, above=0.0)
        Traceback (most recent call last):
        ValueError: tau1 -1.0: give a finite number above 0
    """
    is_number = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    )
    low = is_number and (above is None or value > above) and (least is None or value >= least)
    if not low or value > most:
        bounds = f"above {above:g}" if above is not None else f"of {least:g} or above"
        bounds += "" if math.isinf(most) else f" and at most {most:g}"
        raise ValueError(f"{name} {value!r}: give a finite number {bounds}")


def check_count(name: str, value: int, *, least: int) -> None:
    """Refuse what is no whole number of ``least`` or more.

    Raises:
        ValueError: naming the range.

    Example:
        >>> check_count("window_size", 1, least=2)
        Traceback (most recent call last):
        ValueError: window_size 1: give a whole number of 2 or more
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} {value!r}: give a whole number of {least} or more")


def check_pool(value: int) -> None:
    """Refuse a width that has no middle.

    Raises:
        ValueError: for an even number, or one below 1.

    Example:
        >>> check_pool(4)
        Traceback (most recent call last):
        ValueError: pool 4: give an odd number of 1 or more
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % 2 == 0:
        raise ValueError(f"pool {value!r}: give an odd number of 1 or more")


def check_sizes(sizes: Sequence[int], lengths: Sequence[int], window: int) -> None:
    """Refuse a cache that has no room beside the window in a sample that needs eviction.

    Args:
        sizes: keys that each sample may keep.
        lengths: tokens of each sample.
        window: newest keys that always stay.

    Raises:
        ValueError: naming the sample.

    Example:
        >>> check_sizes([8], [100], 32)
        Traceback (most recent call last):
        ValueError: cache_size of 8 tokens (sample 0) leaves no room beside window_size 32: give
            more than 32, or a smaller window
    """
    for sample, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        if length > size <= window:
            raise ValueError(
                f"cache_size of {size} tokens (sample {sample}) leaves no room beside window_size "
                f"{window}: "
                f"give more than {window}, or a smaller window"
            )
