"""Query and key dimensions of scores, followed from operation to operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.function_mode import modes_off

RESHAPES = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("expand", "expand_as"),
}
"""Views that keep the order of the elements."""

VIEWS = RESHAPES | {
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"),
    *("mT", "T", "mH", "H", "adjoint", "getitem", "narrow", "select", "chunk", "split"),
    *("split_with_sizes", "tensor_split", "unbind", "diagonal", "unfold"),
}

RESIZES = {
    *("cat", "concat", "concatenate", "pad", "getitem", "index_select", "gather"),
    *("take_along_dim", "topk", "sort", "repeat", "repeat_interleave", "tile"),
}
"""Operations that change the size of a dimension and keep its place."""

MAKES = {f"{what}_like" for what in ("full", "zeros", "ones", "empty", "rand", "randn", "randint")}
"""Operations that take no more than the shape of a tensor."""


@dataclass(frozen=True)
class Axes:
    """Dimensions of a tensor along which its rows and its columns lie."""

    rows: frozenset[int]
    """Dimensions along which the rows of the product's left factor lie."""
    columns: frozenset[int]
    """Dimensions along which the rows of its right factor lie."""

    @property
    def all(self) -> frozenset[int]:
        """Dimensions of both."""
        return self.rows | self.columns

    def __or__(self, other: Axes) -> Axes:
        return Axes(self.rows | other.rows, self.columns | other.columns)

    def at(self, place: Callable[[int], int]) -> Axes:
        """Return the axes with each dimension moved to its ``place``."""
        return Axes(frozenset(map(place, self.rows)), frozenset(map(place, self.columns)))


@dataclass(frozen=True)
class Carried:
    """A tensor's axes after an operation."""

    axes: Axes
    in_order: bool = True
    """Whether batch and heads are all there, in their order."""
    start: int = 0
    """First of the old columns that is still there, where one dimension holds them."""


def carry(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
    axes: Axes,
    results: list[Any],
) -> list[Carried | None]:
    """Follow the axes of a tensor into each result of an operation.

    Args:
        name: the operation's, without underscores.
        function: the operation.
        args: its positional arguments.
        kwargs: its named arguments.
        tensor: the argument that is followed.
        axes: its axes.
        results: the results.

    Returns:
        One entry per result, None where the axes are lost.
    """
    if name in MAKES:
        return [None]
    if name in VIEWS and not (name == "getitem" and is_advanced(args[1])):
        return through_view(function, args, kwargs, tensor, axes)
    return [in_place(name, args, kwargs, tensor, axes, result) for result in results]


def is_advanced(index: Any) -> bool:
    """Return whether an index copies instead of giving a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list)
        or (isinstance(part, Tensor) and (part.ndim > 0 or part.dtype == torch.bool))
        for part in parts
    )


def in_place(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
    axes: Axes,
    result: Any,
) -> Carried | None:
    """Return the axes of a result with its dimensions in place, new ones left of them."""
    if not isinstance(result, Tensor):
        return None
    if name == "stack":
        new = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.ndim
        return Carried(axes.at(lambda d: d + (d >= new)), in_order=False)
    more = result.ndim - tensor.ndim
    if more < 0 or (more and name in RESIZES):
        return None
    sizes = [(tensor.shape[d], result.shape[d + more]) for d in axes.all]
    if name not in RESIZES and any(before not in (1, after) for before, after in sizes):
        return None
    return Carried(axes.at(lambda d: d + more), in_order=name not in RESIZES)


def through_view(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
    axes: Axes,
) -> list[Carried | None]:
    """Return the axes of a view, read from the strides of the same view without data."""
    with modes_off():
        probe = torch.empty(tensor.shape, device="meta")
        seen = function(
            *(probe if a is tensor else a for a in args),
            **{k: probe if v is tensor else v for k, v in kwargs.items()},
        )
    return [
        seen_through(probe, part, axes)
        for part in (seen if isinstance(seen, list | tuple) else [seen])
    ]


def seen_through(whole: Tensor, part: Tensor, axes: Axes) -> Carried | None:
    """Return the axes of a view ``part`` of the contiguous tensor ``whole``."""
    covered = [covers(whole, part.stride(d), part.shape[d]) for d in range(part.ndim)]
    # cut to one row or column: its stride alone shows where it lies
    for lost in axes.all - set().union(*covered):
        for d in range(part.ndim):
            if part.shape[d] == 1 and part.stride(d) == whole.stride(lost):
                covered[d] = covered[d] | {lost}
    rows = frozenset(d for d, source in enumerate(covered) if source & axes.rows)
    columns = frozenset(d for d, source in enumerate(covered) if source & axes.columns)
    if not columns and not rows:
        return None
    leading = [
        part.stride(d)
        for d in range(part.ndim)
        if d not in rows | columns and part.shape[d] > 1 and part.stride(d) > 0
    ]
    kept = part.shape.numel() == whole.shape.numel()
    start = 0
    if len(axes.columns) == 1:
        (column,) = axes.columns
        start = (int(part.storage_offset()) // whole.stride(column)) % max(1, whole.shape[column])
    return Carried(Axes(rows, columns), kept and leading == sorted(leading, reverse=True), start)


def covers(whole: Tensor, stride: int, size: int) -> set[int]:
    """Return the dimensions of a contiguous tensor that one of a view runs through."""
    if size == 1:
        return {d for d in range(whole.ndim) if whole.shape[d] == 1 and whole.stride(d) == stride}
    span = stride * (size - 1)
    return {
        d
        for d in range(whole.ndim)
        if whole.shape[d] > 1
        and whole.stride(d) <= span
        and stride < whole.stride(d) * whole.shape[d]
    }
