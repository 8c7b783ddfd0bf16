"""Range checks of parameters, with one-line errors naming value and remedy."""

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
    """Raise an error for a number outside its range.

    Args:
        name: the parameter's name, for the error.
        value: its value.
        above: exclusive lower bound, or None.
        least: inclusive lower bound, or None.
        most: inclusive upper bound.

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
    """Raise an error for anything but a whole number of ``least`` or more.

    Args:
        name: the parameter's name, for the error.
        value: its value.
        least: inclusive lower bound.

    Raises:
        ValueError: naming the range.

    Example:
        >>> check_count("window_size", 1, least=2)
        Traceback (most recent call last):
        ValueError: window_size 1: give a whole number of 2 or more
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} {value!r}: give a whole number of {least} or more")


def check_pool(name: str, value: int) -> None:
    """Raise an error for a pooling width without a middle.

    Args:
        name: the parameter's name, for the error.
        value: its value.

    Raises:
        ValueError: for an even number, or one below 1.

    Example:
        >>> check_pool("pool", 4)
        Traceback (most recent call last):
        ValueError: pool 4: give an odd number of 1 or more
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} {value!r}: give an odd number of 1 or more")


def check_sizes(sizes: Sequence[int], lengths: Sequence[int], window: int) -> None:
    """Raise an error for a cache without room beside the window.

    Samples that fit whole are not checked.

    Args:
        sizes: keys that each sample may keep.
        lengths: tokens of each sample.
        window: number of newest keys, which always stay.

    Raises:
        ValueError: naming the sample.

    Example:
        >>> check_sizes([8], [100], 32)  # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
        ValueError: cache_size of 8 tokens (sample 0) leaves no room beside window_size 32: give
            more than 32, or a smaller window
    """
    for sample, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        if length > size <= window:
            raise ValueError(
                f"cache_size of {size} tokens (sample {sample}) leaves no room beside window_size "
                f"{window}: give more than {window}, or a smaller window"
            )
