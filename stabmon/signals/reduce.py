"""Reduction of an operator's signals to one number per head, on its own device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon._torch.precision import full_float32
from stabmon.operator import AttentionOperator
from stabmon.signals.base import SIGNALS, Signal


@dataclass(frozen=True, eq=False)
class HeadSums:
    """Mergeable values of a signal over one or more calls, each ``[H]``.

    A mean is ``total / count``, a maximum ``total``.
    """

    signal: Signal
    total: Tensor
    count: Tensor

    def merge(self, other: HeadSums) -> HeadSums:
        """Return the signal over the rows of both."""
        if self.signal.reduction == "max":
            return HeadSums(
                self.signal, torch.maximum(self.total, other.total), self.count + other.count
            )
        return HeadSums(self.signal, self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        """``[H]``, one value per head; NaN where no row counted."""
        if self.signal.reduction == "max":
            return torch.where(self.count > 0, self.total, torch.nan)
        return self.total / self.count


def measure(
    attention: AttentionOperator,
    signals: Sequence[str],
    *,
    sample_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, HeadSums]:
    """Reduce the signals of one operator over batch and counted rows.

    All signals together take as few passes as the engine can.

    Args:
        attention: the operator.
        signals: names of :data:`SIGNALS`.
        sample_rows: query rows to measure means on, one drawn from each of as many equal
            stretches of the positions; maxima are always over all rows. None for all rows.
        generator: source of the draw; None for a fresh one with seed 0, never the global one.

    Returns:
        By signal, in the order of ``signals``.

    Raises:
        ValueError: for an unknown name, or a number of rows below 1.

    Example:
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 2, 4, 8)
        >>> measure(attention_operator(query, query, scale=1.0), ["max_logit"])["max_logit"].value
        tensor([8., 8.])
    """
    wanted = [SIGNALS[name] for name in signals]
    if sample_rows is not None and sample_rows < 1:
        raise ValueError(f"sample_rows {sample_rows}: give at least 1, or None for all rows")
    with torch.no_grad(), full_float32(attention.query.device):
        if sample_rows is None or sample_rows >= attention.queries:
            return _reduce(attention, wanted)
        maxima = [each for each in wanted if each.reduction == "max"]
        means = [each for each in wanted if each.reduction == "mean"]
        found = _reduce(attention, maxima) if maxima else {}
        return found | (
            _reduce(attention.rows(_draw(attention, sample_rows, generator)), means)
            if means
            else {}
        )


def least_counted(visible: Tensor, least: int) -> Tensor:
    """Return the number of visible keys from which on a row of one attention call counts.

    Args:
        visible: integers of any shape, each row's number of visible keys; 0 for padding.
        least: number that is asked for.

    Returns:
        Integer scalar on the device of ``visible``: ``least``; where no row sees so many, as in
        short sequences and narrow windows, half of the most that one sees, and 2 at least.

    Example:
        >>> [int(least_counted(torch.arange(1, n + 1), 16)) for n in (40, 16, 8, 3)]
        [16, 16, 4, 2]
    """
    most = visible.amax()
    return torch.where(most >= least, least, ((most + 1) // 2).clamp(min=min(2, least)))


def _reduce(attention: AttentionOperator, wanted: Sequence[Signal]) -> dict[str, HeadSums]:
    attention.prepare({need for each in wanted for need in each.needs})
    found: dict[str, HeadSums] = {}
    visible = attention.n_visible().masked_fill(~attention.is_counted, 0)
    for least in {each.least_visible for each in wanted}:
        counted = attention.is_counted & (visible >= least_counted(visible, least))
        count = counted.sum(dim=(0, 2))
        for reduction, left_out in (("mean", 0.0), ("max", -torch.inf)):
            alike = [
                each
                for each in wanted
                if (each.reduction, each.least_visible) == (reduction, least)
            ]
            if not alike:
                continue
            rows = torch.stack([each.function(attention) for each in alike]).masked_fill_(
                ~counted, left_out
            )
            if reduction == "max":
                totals = rows.amax(dim=(1, 3))
            else:
                totals = rows.sum(
                    dim=(1, 3), dtype=torch.float64 if rows.device.type == "cpu" else None
                )
            found |= {
                each.name: HeadSums(each, total, count)
                for each, total in zip(alike, totals, strict=True)
            }
    return {each.name: found[each.name] for each in wanted}


def _draw(attention: AttentionOperator, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw one row from each of ``count`` equal stretches of the positions, ascending.

    A row on an edge may come twice.
    """
    edges = torch.linspace(0, attention.queries, count + 1, dtype=torch.float64)
    offsets = torch.rand(
        count, generator=generator or torch.Generator().manual_seed(0), dtype=torch.float64
    )
    index = (edges[:-1] + offsets * edges.diff()).floor().long().clamp(max=attention.queries - 1)
    rows: Tensor = index.to(attention.query.device)
    return rows
