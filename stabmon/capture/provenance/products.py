"""Scores: what is known of a tensor that came of a product of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.masks.masking import Cells, chosen, either, lowered, nothing
from stabmon.capture.protocol import isolated, kernel_dtype
from stabmon.capture.provenance.axes import RESHAPES, VIEWS, Axes, Carried
from stabmon.capture.provenance.multiply import factors

FILL = -1e4
"""A constant at or below this, filled in or added, hides a key: its probability is exactly 0 in
every format.
"""


@dataclass(frozen=True, eq=False)
class ScoreProvenance:
    """A tensor that came of ``query @ key.T``, and how."""

    query: Tensor | None
    """``[..., Q, D]``; None where the scores are no function of one query and one key."""
    key: Tensor | None
    """``[..., K, D]``."""
    dtype: torch.dtype
    axes: Axes
    """Where queries and keys lie."""
    scale: float = 1.0
    cap: float | None = None
    """What the capped score was multiplied by since; ``scale`` is the factor inside the tanh."""
    masked: bool = False
    """Whether something was added or filled in."""
    gated: bool = False
    """Whether some scores were multiplied by 0."""
    fills: tuple[float, ...] = ()
    shift: Tensor | None = None
    """What was taken off every score of a row, ``[..., Q, 1]``: the softmax does not see it, the
    largest score does.
    """
    cells: Cells = nothing
    """Where the model has masked scores, with whatever value."""
    pieces: tuple[int, ...] = ()
    """How many keys each of the tensors gave that were joined along the keys last; empty where none
    were.
    """

    def opaque(self) -> ScoreProvenance:
        """The same where only the scores can be told from now on."""
        return replace(self, query=None, key=None)


def product_of(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> ScoreProvenance | None:
    """The product of queries and keys that an operation forms, if it does."""
    found = factors(name, args, kwargs, result)
    if found is None:
        return None
    made, scale, masked = found
    return ScoreProvenance(
        made.left, made.right, kernel_dtype(made.left), made.axes, scale=scale, masked=masked
    )


KEEPS = {
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type",
    "type_as",
    "contiguous",
    "clone",
    "detach",
    "cuda",
    "cpu",
    "alias",
}
ADDS = {"add", "radd", "iadd", "sub", "isub", "where", "masked_fill", "setitem", "nan_to_num"} | {
    *("clamp", "clamp_min", "max", "maximum")
}
SCALES = {
    "mul": 1,
    "rmul": 1,
    "imul": 1,
    "multiply": 1,
    "div": -1,
    "truediv": -1,
    "itruediv": -1,
    "true_divide": -1,
}
TIMES = {"mul", "rmul", "imul", "multiply"}


def moved(name: str, product: ScoreProvenance, carried: Carried, cells: Cells) -> ScoreProvenance:
    """What a product becomes by a view, or by another choice and order of its elements."""
    kept = product if carried.in_order and name in VIEWS else product.opaque()
    pieces = () if name in VIEWS - RESHAPES else product.pieces
    return replace(kept, axes=carried.axes, cells=cells, pieces=pieces)


def step(
    name: str, product: ScoreProvenance, others: list[Any], position: int = 0
) -> ScoreProvenance | None:
    """What a product becomes by one operation; None where nothing can be told of it any more.

    Args:
        name: of the operation, without underscores.
        product: what the tensor was.
        others: the other arguments, as given.
        position: the place of the tensor among the arguments.
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
    if name == "neg" or (name in SCALES and is_number(other) and (position == 0 or name in TIMES)):
        return scaled(product, -1.0 if name == "neg" else times(name, float(other)))
    if name in TIMES and is_column(other) and can_take(product, other):
        return replace(product, query=product.query * other.detach())
    if name in TIMES and is_gate(other):
        return replace(product, masked=True, gated=True)
    if name == "tanh" and product.cap is None and not product.masked:
        return replace(product, cap=1.0)
    return product.opaque() if product.shift is None else None


def times(name: str, number: float) -> float:
    """The factor that an operation with a number is."""
    return number if SCALES[name] > 0 else 1 / number if number else math.inf


def scaled(product: ScoreProvenance, factor: float) -> ScoreProvenance:
    """The product times a number."""
    if factor == 0 or not math.isfinite(factor):  # which no scale of query and key can be
        product = product.opaque()
    if product.shift is not None:
        with isolated():
            product = replace(product, shift=product.shift * factor)
    if product.cap is None:
        return replace(product, scale=product.scale * factor)
    return replace(product, cap=product.cap * factor)


def masks(name: str, others: list[Any], position: int) -> Cells:
    """The cells that one operation masks."""
    if name in ("add", "radd", "iadd", "sub", "isub"):
        sign = -1.0 if name in ("sub", "isub") else 1.0
        return lowered(others[0], sign) if others and isinstance(others[0], Tensor) else nothing
    if name == "masked_fill":
        return chosen(others[0] if others else None, where=True)
    if (
        name == "where"
    ):  # where(condition, scores, other), scores.where(condition, other), where(condition, other, scores)
        condition = next(
            (o for o in others if isinstance(o, Tensor) and o.dtype == torch.bool), None
        )
        return chosen(condition, where=position == 2)
    return nothing


def is_shift(value: object) -> bool:
    """Whether ``value`` is one number a row, or one for all rows."""
    return is_column(value) or (isinstance(value, Tensor) and value.ndim == 0)


def can_take(product: ScoreProvenance, gain: Tensor) -> bool:
    """Whether a gain a head or a query, ``[..., H, Q or 1, 1]``, can be multiplied into the query
    instead of the scores.
    """
    query = product.query
    if query is None or product.cap is not None or product.masked or gain.ndim > query.ndim:
        return False
    lie_alike = product.axes == Axes(frozenset({query.ndim - 2}), frozenset({query.ndim - 1}))
    return lie_alike and all(
        g in (1, q) for g, q in zip(gain.shape[::-1], query.shape[::-1], strict=False)
    )


def is_gate(value: object) -> bool:
    """Whether ``value`` holds ones and zeros only."""
    if not isinstance(value, Tensor) or value.requires_grad or value.ndim < 2:
        return False
    if value.dtype == torch.bool:
        return True
    with isolated():
        return bool(((value == 0) | (value == 1)).all().item())


def is_column(value: object) -> bool:
    """Whether ``value`` is one number a row."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[-1] == 1


def is_number(value: object) -> bool:
    """Whether ``value`` is one real number, as such or in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)
