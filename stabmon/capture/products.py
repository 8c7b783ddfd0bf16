"""Products of queries and keys, followed from operation to operation until a softmax is taken of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from stabmon.capture.base import bind, kernel_dtype
from stabmon.capture.einsum import einsum_operands

FILL = -1e4
"""A constant at or below this, filled in or added, hides a key: its probability is exactly 0 in every format."""


@dataclass(frozen=True, eq=False)
class Product:
    """A tensor that came of ``query @ key.T``, and how."""

    query: Tensor | None
    """``[..., Q, D]``; None where the scores are no function of one query and one key."""
    key: Tensor | None
    """``[..., K, D]``."""
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None
    """What the capped score was multiplied by since; ``scale`` is the factor inside the tanh."""
    masked: bool = False
    """Whether something was added or filled in."""
    fills: tuple[float, ...] = ()
    shift: Tensor | None = None
    """What was taken off every score of a row, ``[..., Q, 1]``: the softmax does not see it, the largest score does."""

    def opaque(self) -> Product:
        """The same where only the scores can be told from now on."""
        return replace(self, query=None, key=None)


class Products:
    """Which of a forward's living tensors came of a product of queries and keys."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def get(self, tensor: object) -> Product | None:
        """What is known of ``tensor``."""
        product: Product | None = self._known.get(tensor) if isinstance(tensor, Tensor) else None
        return product

    def follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Learn from one operation that the model has made."""
        if name == "__setitem__":
            result = args[0]
        if not isinstance(result, Tensor) or result.ndim < 3 or not result.is_floating_point():
            return
        product = multiply(name, args, kwargs) or self._next(name, args, kwargs, result)
        if product is not None:
            self._known[result] = product

    def _next(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> Product | None:
        if not len(self._known):
            return None
        operands = (*args, *kwargs.values())
        parents = [(operand, product) for operand in operands if (product := self.get(operand)) is not None]
        if not parents or parents[0][0].shape[-2:] != result.shape[-2:] or parents[0][0].numel() != result.numel():
            return None
        tensor, product = parents[0]
        if len({id(p) for _, p in parents}) > 1:
            return product.opaque()
        others = [operand for operand in operands if operand is not tensor]
        return step(name.strip("_"), product, others)


def multiply(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """The product of queries and keys that an operation forms, if it does."""
    if name == "einsum":
        operands = einsum_operands(args)
        if operands is None:
            return None
        left, right = operands
        return Product(left, right, kernel_dtype(left))
    if name in ("matmul", "__matmul__", "bmm"):
        left, right, factor, masked = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values())), 1.0, False
    elif name == "baddbmm":
        given = bind(("input", "batch1", "batch2"), args, kwargs)
        left, right, factor, masked = given["batch1"], given["batch2"], given.get("alpha", 1.0), given.get("beta", 1) != 0
    else:
        return None
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.ndim < 3 or right.ndim < 3:
        return None
    return Product(left, right.transpose(-1, -2), kernel_dtype(left), scale=float(factor), masked=masked)


KEEPS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"} | {
    *("view", "view_as", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze")
}
ADDS = {"add", "radd", "iadd", "sub", "isub", "where", "masked_fill", "setitem", "nan_to_num"} | {
    *("clamp", "clamp_min", "max", "maximum")
}
SCALES = {"mul": 1, "rmul": 1, "imul": 1, "multiply": 1, "div": -1, "truediv": -1, "itruediv": -1, "true_divide": -1}


def step(name: str, product: Product, others: list[Any]) -> Product:
    """What a product becomes by one operation, named without underscores, with its ``others`` operands."""
    if name in KEEPS:
        return product
    if name in ("sub", "isub") and product.shift is None and len(others) == 1 and is_column(others[0]):
        return replace(product, shift=others[0])
    if name in ADDS:
        fills = tuple(float(other) for other in others if is_number(other) and float(other) <= FILL)
        return replace(product, masked=True, fills=product.fills + fills)
    if name in SCALES and len(others) == 1 and is_number(others[0]) and product.shift is None:
        factor = float(others[0]) ** SCALES[name]
        if product.cap is None:
            return replace(product, scale=product.scale * factor)
        return replace(product, cap=product.cap * factor)
    if name in ("mul", "rmul", "imul") and len(others) == 1 and is_column(others[0]) and can_take(product, others[0]):
        return replace(product, query=product.query * others[0].detach())
    if name == "tanh" and product.cap is None and not product.masked:
        return replace(product, cap=1.0)
    return product.opaque()


def can_take(product: Product, gain: Tensor) -> bool:
    """Whether a gain a head or a query, ``[..., H, Q or 1, 1]``, can be multiplied into the query instead of the scores."""
    return product.cap is None and not product.masked and product.query is not None and gain.ndim <= product.query.ndim


def is_column(value: object) -> bool:
    """Whether ``value`` is one number a row."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[-1] == 1


def is_number(value: object) -> bool:
    """Whether ``value`` is one real number, as such or in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)
