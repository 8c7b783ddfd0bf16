"""Products of queries and keys that are multiplied out before they are summed.

For example ``(q[..., :, None, :] * k[..., None, :, :]).sum(-1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabmon.capture.function_mode import kernel_dtype
from stabmon.capture.provenance.axes import Axes
from stabmon.capture.provenance.products import TIMES, ScoreProvenance


@dataclass(frozen=True, eq=False)
class Outer:
    """Product of each row of one tensor with each of another, not yet summed over D."""

    left: Tensor
    right: Tensor
    row: int
    """Dimension along which the rows of ``left`` lie."""
    column: int
    """Dimension along which the rows of ``right`` lie."""


def outer_of(name: str, args: tuple[Any, ...], result: Tensor) -> Outer | None:
    """Return the outer product that a multiplication forms, None where it forms none."""
    if (
        name not in TIMES
        or result.ndim < 3
        or len(args) != 2
        or not all(isinstance(each, Tensor) for each in args)
    ):
        return None
    left, right = (
        each[(None,) * (result.ndim - each.ndim)] if each.ndim < result.ndim else each
        for each in args
    )
    rows = [d for d in range(result.ndim) if left.shape[d] > 1 == right.shape[d]]
    columns = [d for d in range(result.ndim) if right.shape[d] > 1 == left.shape[d]]
    return Outer(left, right, rows[0], columns[0]) if len(rows) == len(columns) == 1 else None


def summed_outer(
    outer: Outer, over: frozenset[int], kwargs: Mapping[str, Any]
) -> ScoreProvenance | None:
    """Return the scores that a sum over one more dimension gives, None for none."""
    if len(over) != 1 or over & {outer.row, outer.column} or kwargs.get("keepdim"):
        return None
    (inner,) = over
    if outer.left.shape[inner] != outer.right.shape[inner]:
        return None
    batch = [d for d in range(outer.left.ndim) if d not in (outer.row, outer.column, inner)]
    left = outer.left.permute(*batch, outer.column, outer.row, inner).squeeze(len(batch))
    right = outer.right.permute(*batch, outer.row, outer.column, inner).squeeze(len(batch))
    axes = Axes(*(frozenset({d - (d > inner)}) for d in (outer.row, outer.column)))
    return ScoreProvenance(left, right, kernel_dtype(outer.left), axes)
