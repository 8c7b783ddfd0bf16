"""What a signal is, and the table of all signals."""

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
    """One number a row, ``function(operator) -> [B, H, Q]``, and how rows become one number a
    head.
    """

    name: str
    function: Function
    unit: str
    reduction: Literal["mean", "max"]
    """Over batch and counted rows."""
    needs: tuple[str, ...]
    """The statistics it asks of the operator, so that all signals' are computed in one pass."""
    least_visible: int = 1
    """Rows that see fewer keys than this are not counted."""


SIGNALS: Registry[Signal] = Registry("signal", package="stabmon.signals")


def signal(
    *, unit: str, reduction: Literal["mean", "max"], needs: tuple[str, ...], least_visible: int = 1
) -> Callable[[Function], Function]:
    """Register a function of an attention operator as the signal of its name.

    Raises:
        ValueError: if it needs a statistic that operators do not have, or if the name is taken.
    """
    if unknown := set(needs) - STATISTICS:
        raise ValueError(
            f"no operator gives {sorted(unknown)[0]!r}. Known: {', '.join(sorted(STATISTICS))}"
        )

    def register(function: Function) -> Function:
        SIGNALS.register(
            function.__name__,
            Signal(function.__name__, function, unit, reduction, needs, least_visible),
        )
        return function

    return register
