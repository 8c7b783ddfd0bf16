"""Scores: tensors that came of a product of queries and keys, and their origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.function_mode import isolated, kernel_dtype
from stabmon.capture.provenance.axes import RESHAPES, VIEWS, Axes, Carried
from stabmon.capture.provenance.cells import Cells, chosen, either, lowered, no_cells
from stabmon.capture.provenance.multiply import factors

FILL = -1e4
"""Constant at or below which a value filled in or added hides a key: its probability is exactly 0
in every format.
"""


@dataclass(frozen=True, eq=False)
class ExplicitSum:
    """Exponentials of scores that a model forms and sums by itself, row by row."""

    largest: Tensor
    """Largest argument of each row's exponentials, of size 1 along the keys.

    Keys that are hidden only after exp count in it.
    """
    total: Tensor
    """Logarithm of each row's sum, of the same shape; -inf where every key is hidden."""
    keys: int
    """Number of keys, hidden ones included."""
    dtype: torch.dtype
    """The exponentials'."""
    sum_dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class ScoreProvenance:
    """A tensor that came of ``query @ key.T``, and the way it came about."""

    query: Tensor | None
    """``[..., Q, D]``; None where the scores are no function of one query and one key."""
    key: Tensor | None
    """``[..., K, D]``."""
    dtype: torch.dtype
    axes: Axes
    """Dimensions along which queries and keys lie."""
    scale: float = 1.0
    cap: float | None = None
    """Factor of the capped score since the tanh; ``scale`` is the factor inside it."""
    masked: bool = False
    """True if something was added or filled in."""
    gated: bool = False
    """True if some scores were multiplied by 0."""
    fills: tuple[float, ...] = ()
    shift: Tensor | None = None
    """Number subtracted from every score of a row, ``[..., Q, 1]``: it leaves the softmax as it is
    and changes the largest score.
    """
    cells: Cells = no_cells
    """Scores that the model has masked, with whatever value."""
    pieces: tuple[int, ...] = ()
    """Number of keys of each of the tensors joined along the keys last; empty where none were."""
    explicit: ExplicitSum | None = None
    """Set where the softmax of these scores is made of exponentials by hand."""

    def opaque(self) -> ScoreProvenance:
        """Return the record of scores whose query and key are no longer known."""
        return replace(self, query=None, key=None)


def product_of(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> ScoreProvenance | None:
    """Return the scores that an operation forms of queries and keys, None for none."""
    found = factors(name, args, kwargs, result)
    if found is None:
        return None
    made, scale, masked = found
    return ScoreProvenance(
        made.left, made.right, kernel_dtype(made.left), made.axes, scale=scale, masked=masked
    )


KEEPS = {
    *("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"),
    *("detach", "cuda", "cpu", "alias"),
}
"""Operations that keep every value, up to rounding."""
ADDS = {
    *("add", "radd", "iadd", "sub", "isub", "where", "masked_fill", "setitem", "nan_to_num"),
    *("clamp", "clamp_min", "max", "maximum"),
}
"""Operations by which scores are masked or a bias is added."""
TIMES = {"mul", "rmul", "imul", "multiply"}
DIVIDES = {"div", "truediv", "itruediv", "divide", "true_divide"}


def moved(name: str, product: ScoreProvenance, carried: Carried, cells: Cells) -> ScoreProvenance:
    """Follow scores through a view, or another choice and order of their elements."""
    kept = product if carried.in_order and name in VIEWS else product.opaque()
    pieces = () if name in VIEWS - RESHAPES else product.pieces
    return replace(kept, axes=carried.axes, cells=cells, pieces=pieces)


def step(
    name: str, product: ScoreProvenance, others: list[Any], position: int = 0
) -> ScoreProvenance | None:
    """Follow scores through arithmetic.

    Args:
        name: the operation's, without underscores.
        product: what is known of the scores until then.
        others: the other arguments, as given.
        position: the place of the scores among the arguments.

    Returns:
        What is known of the result; None where its largest score no longer is.
    """
    other: Any = others[0] if len(others) == 1 else None
    if name in KEEPS or (name == "copy" and position == 1):
        return product
    if name in ("sub", "isub") and position == 0 and product.shift is None and is_shift(other):
        return replace(product, shift=other)
    if name in ADDS:
        fills = tuple(float(o) for o in others if is_number(o) and float(o) <= FILL)
        marked = either(product.cells, masks(name, others, position))
        return replace(product, masked=True, fills=product.fills + fills, cells=marked)
    if name == "neg":
        return scaled(product, -1.0)
    if name in TIMES and is_number(other):
        return scaled(product, float(other))
    if name in DIVIDES and is_number(other) and position == 0:
        return scaled(product, 1 / float(other) if float(other) else math.inf)
    if name in TIMES and is_column(other) and can_take(product, other):
        return replace(product, query=product.query * other.detach())
    if name in TIMES and is_gate(other):
        return replace(product, masked=True, gated=True)
    if name == "tanh" and product.cap is None and not product.masked:
        return replace(product, cap=1.0)
    return product.opaque() if product.shift is None else None


def scaled(product: ScoreProvenance, factor: float) -> ScoreProvenance:
    """Return what is known of scores times a number."""
    if factor == 0 or not math.isfinite(factor):  # which no scale of query and key can be
        product = product.opaque()
    if product.shift is not None:
        with isolated():
            product = replace(product, shift=product.shift * factor)
    if product.cap is None:
        return replace(product, scale=product.scale * factor)
    return replace(product, cap=product.cap * factor)


def masks(name: str, others: list[Any], position: int) -> Cells:
    """Return the cells that one operation masks."""
    if name in ("add", "radd", "iadd", "sub", "isub"):
        sign = -1.0 if name in ("sub", "isub") else 1.0
        return lowered(others[0], sign) if others and isinstance(others[0], Tensor) else no_cells
    if name == "masked_fill":
        return chosen(others[0] if others else None, where=True)
    if name == "where":
        # where(condition, scores, other), scores.where(condition, other), or
        # where(condition, other, scores), which alone masks where the condition holds
        bools = (each for each in others if isinstance(each, Tensor) and each.dtype == torch.bool)
        return chosen(next(bools, None), where=position == 2)
    return no_cells


def is_shift(value: object) -> bool:
    """Return whether ``value`` is one number per row, or one for all rows."""
    return is_column(value) or (isinstance(value, Tensor) and value.ndim == 0)


def can_take(product: ScoreProvenance, gain: Tensor) -> bool:
    """Return whether a gain can be multiplied into the query instead of the scores.

    It must be one per head or query, ``[..., H, Q or 1, 1]``.
    """
    query = product.query
    if query is None or product.cap is not None or product.masked or gain.ndim > query.ndim:
        return False
    lie_alike = product.axes == Axes(frozenset({query.ndim - 2}), frozenset({query.ndim - 1}))
    return lie_alike and all(
        g in (1, q) for g, q in zip(gain.shape[::-1], query.shape[::-1], strict=False)
    )


def is_gate(value: object) -> bool:
    """Return whether ``value`` holds ones and zeros only."""
    if not isinstance(value, Tensor) or value.requires_grad or value.ndim < 2:
        return False
    if value.dtype == torch.bool:
        return True
    with isolated():
        return bool(((value == 0) | (value == 1)).all().item())


def is_column(value: object) -> bool:
    """Return whether ``value`` is one number per row."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[-1] == 1


def is_number(value: object) -> bool:
    """Return whether ``value`` is one real number, as such or in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)
