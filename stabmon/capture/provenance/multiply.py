"""Products of two tensors: their factors, and the dimensions summed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stabmon.capture.protocol import bind
from stabmon.capture.provenance.axes import Axes
from stabmon.capture.provenance.einsum import Factors, factors_of, read_einsum

PRODUCTS = {
    "matmul",
    "rmatmul",
    "bmm",
    "mm",
    "baddbmm",
    "addbmm",
    "addmm",
    "einsum",
    "tensordot",
    "linear",
}
MATRICES = {
    "matmul": (0, 1),
    "rmatmul": (1, 0),
    "bmm": (0, 1),
    "mm": (0, 1),
    "baddbmm": (1, 2),
    "addbmm": (1, 2),
    "addmm": (1, 2),
}
"""Places of the left and the right factor among the arguments of a product of matrices."""
NAMES = {
    "bmm": ("input", "mat2"),
    "mm": ("input", "mat2"),
    "matmul": ("input", "other"),
    "tensordot": ("a", "b", "dims"),
} | {
    name: ("input", "batch1", "batch2") if "b" in name else ("input", "mat1", "mat2")
    for name in ("baddbmm", "addbmm", "addmm")
}


@dataclass(frozen=True)
class Sum:
    """A sum of products over some dimensions of an operand."""

    over: frozenset[int]
    places: dict[int, int]
    """Places of the operand's other dimensions in the result."""


def factor(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> Any:
    """Return the left (0) or right (1) factor of a product of matrices."""
    given = list(bind(NAMES.get(name, ("input", "other")), args, kwargs).values())
    index = MATRICES[name][position]
    return given[index] if index < len(given) else None


def factors(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> tuple[Factors, float, bool] | None:
    """Return the factors of a product, its scale, and whether something was added.

    None where it is no product of batched rows and columns.
    """
    if name == "einsum":
        einsum = read_einsum(args)
        found = None if einsum is None else factors_of(einsum)
        return None if found is None else (found, 1.0, False)
    if name == "tensordot":
        return unbatched(args, kwargs, result)
    if name not in ("matmul", "rmatmul", "bmm", "mm", "baddbmm"):
        return None
    left, right = factor(name, args, kwargs, 0), factor(name, args, kwargs, 1)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if min(left.ndim, right.ndim) < 3 and not (
        left.ndim == right.ndim == 2 and not is_weight(left) and not is_weight(right)
    ):
        return None
    axes = Axes(frozenset({result.ndim - 2}), frozenset({result.ndim - 1}))
    added = name == "baddbmm" and kwargs.get("beta", 1) != 0
    return Factors(left, right.transpose(-1, -2), axes), float(kwargs.get("alpha", 1.0)), added


def is_weight(tensor: Tensor) -> bool:
    """Return whether a matrix is a parameter, or a view of one."""
    # Private, checked with torch 2.13: the tensor that a view is of. Without it a product with a
    # transposed weight is taken for scores; it is attention only if its softmax is used as weights.
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def unbatched(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> tuple[Factors, float, bool] | None:
    """Return the factors of a tensordot over one dimension of two matrices."""
    sums = [summed("tensordot", args, kwargs, side) for side in (0, 1)]
    left, right = args[:2]
    if result.ndim != 2 or left.ndim != 2 or right.ndim != 2 or is_weight(left) or is_weight(right):
        return None
    left, right = (
        t if s is not None and 1 in s.over else t.T
        for t, s in zip((left, right), sums, strict=True)
    )
    return Factors(left, right, Axes(frozenset({0}), frozenset({1}))), 1.0, False


def sums(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Tensor) -> list[Sum]:
    """Return how a product sums over ``tensor``, once for each operand that it is."""
    sides = range(len(args)) if name == "einsum" else (0, 1)
    return [
        found
        for side in sides
        if is_operand(name, args, kwargs, tensor, side)
        and (found := summed(name, args, kwargs, side))
    ]


def is_operand(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Tensor, side: int
) -> bool:
    """Return whether ``tensor`` is the left (0) or right (1) operand."""
    if name == "einsum":
        einsum = read_einsum(args)
        return einsum is not None and side < len(einsum.tensors) and einsum.tensors[side] is tensor
    if name in ("linear", "tensordot"):
        given = [*args, *kwargs.values()]
        return len(given) > side and given[side] is tensor
    return factor(name, args, kwargs, side) is tensor


def summed(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], side: int) -> Sum | None:
    """Return how a product sums over its left (0) or right (1) operand."""
    if name == "einsum":
        einsum = read_einsum(args)
        if einsum is None:
            return None
        letters = einsum.letters[side]
        over = frozenset(d for d, letter in enumerate(letters) if letter not in einsum.output)
        return Sum(
            over,
            {d: einsum.output.index(letter) for d, letter in enumerate(letters) if d not in over},
        )
    given = [*args, *kwargs.values()]
    if name == "linear":
        last = given[side].ndim - 1
        return Sum(frozenset({last}), {d: d for d in range(last)} if side == 0 else {})
    if name == "tensordot":
        return of_tensordot(given[0], given[1], given[2] if len(given) > 2 else 2, side)
    left, right = factor(name, args, kwargs, 0), factor(name, args, kwargs, 1)
    own = (left, right)[side].ndim
    more = max(left.ndim, right.ndim) - own
    inner = own - 1 if side == 0 else max(0, own - 2)
    places = {d: d + more - (right.ndim == 1 and side == 1) for d in range(own) if d != inner}
    if name == "addbmm":
        return Sum(frozenset({0, inner}), {d: d - 1 for d in places if d})
    return Sum(frozenset({inner}), places)


def of_tensordot(left: Tensor, right: Tensor, dims: Any, side: int) -> Sum:
    """Return how a tensordot sums over its left (0) or right (1) operand."""
    if isinstance(dims, int):
        dims = (range(left.ndim - dims, left.ndim), range(dims))
    over = [
        frozenset(d % t.ndim for d in (given if not isinstance(given, int) else [given]))
        for t, given in zip((left, right), dims, strict=True)
    ]
    first = left.ndim - len(over[0]) if side else 0
    rest = [d for d in range((left, right)[side].ndim) if d not in over[side]]
    return Sum(over[side], {d: first + place for place, d in enumerate(rest)})
