"""The type of a signal, and the registry of all signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stabmon.operator import STATISTICS, AttentionOperator
from stabmon.registry import Registry

Function = Callable[[AttentionOperator], Tensor]


@dataclass(frozen=True)
class Signal:
    """A function of an operator, ``[B, H, Q]``, with its reduction to ``[H]``."""

    name: str
    function: Function
    unit: str
    reduction: Literal["mean", "max"]
    """Over batch and counted rows."""
    needs: tuple[str, ...]
    """Statistics that the function uses; those of all signals are computed in one pass."""
    least_visible: int = 1
    """Visible keys below which a row is not counted.

    Fewer where no row of a call sees so many: see :func:`stabmon.signals.reduce.least_counted`.
    """


SIGNALS: Registry[Signal] = Registry("signal", package="stabmon.signals")


def signal(
    *, unit: str, reduction: Literal["mean", "max"], needs: tuple[str, ...], least_visible: int = 1
) -> Callable[[Function], Function]:
    """Register a function of an attention operator as the signal of its name.

    Args:
        unit: the unit of its values; one that begins with ``probability`` or ``share`` means
            values in [0, 1].
        reduction: over batch and counted rows.
        needs: names of :data:`stabmon.operator.STATISTICS` that the function uses.
        least_visible: visible keys below which a row is not counted.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: if it needs a statistic that operators do not have, or if the name is taken.

    Example:
        >>> @signal(unit="nats", reduction="max", needs=("entrpy",))  # doctest: +ELLIPSIS
        ... def largest_entropy(attention): ...
        Traceback (most recent call last):
        ValueError: unknown statistic 'entrpy'. Known: collision, entropy, first_key_mass, ...
    """
    if unknown := set(needs) - STATISTICS:
        name = sorted(unknown)[0]
        raise ValueError(f"unknown statistic {name!r}. Known: {', '.join(sorted(STATISTICS))}")

    def register(function: Function) -> Function:
        SIGNALS.register(
            function.__name__,
            Signal(function.__name__, function, unit, reduction, needs, least_visible),
        )
        return function

    return register
