"""Follow the query and key dimensions of scores through views, joins and arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

RESHAPES = {
    "view",
    "view_as",
    "reshape",
    "reshape_as",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "expand",
    "expand_as",
}
"""Views that keep the order of the elements."""

VIEWS = RESHAPES | {
    *(
        "permute",
        "transpose",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "mT",
        "T",
        "mH",
        "H",
        "adjoint",
        "getitem",
    ),
    *(
        "narrow",
        "select",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "diagonal",
        "unfold",
    ),
}

RESIZES = {
    "cat",
    "concat",
    "concatenate",
    "pad",
    "getitem",
    "index_select",
    "gather",
    "take_along_dim",
} | {*("topk", "sort", "repeat", "repeat_interleave", "tile")}
"""Operations that change the size of a dimension and keep its place."""

MAKES = {f"{what}_like" for what in ("full", "zeros", "ones", "empty", "rand", "randn", "randint")}
"""Operations that take no more than the shape of a tensor."""


@dataclass(frozen=True)
class Axes:
    """The dimensions of a tensor along which its rows (of the left factor) and its columns (of the
    right factor) lie.
    """

    rows: frozenset[int]
    columns: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        """Both."""
        return self.rows | self.columns

    def __or__(self, other: Axes) -> Axes:
        return Axes(self.rows | other.rows, self.columns | other.columns)

    def at(self, place: Callable[[int], int]) -> Axes:
        """The axes with each dimension moved to its ``place``."""
        return Axes(frozenset(map(place, self.rows)), frozenset(map(place, self.columns)))


@dataclass(frozen=True)
class Carried:
    """Where a tensor's axes lie after an operation."""

    axes: Axes
    in_order: bool = True
    """True while batch and heads are all there, in their order."""
    start: int = 0
    """The first of the old columns that is still there, where there was one dimension of them."""


def carry(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
    axes: Axes,
    results: list[Any],
) -> list[Carried | None]:
    """Follow the axes of ``tensor`` into each result of an operation; None where they are lost."""
    if name in MAKES:
        return [None]
    if name in VIEWS and not (name == "getitem" and is_advanced(args[1])):
        return through_view(function, args, kwargs, tensor, axes)
    return [in_place(name, args, kwargs, tensor, axes, result) for result in results]


def is_advanced(index: Any) -> bool:
    """Whether an index copies instead of giving a view."""
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
    """Axes of a result whose dimensions stand where they stood, new ones left of them."""
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
    """Axes of a view, told by the strides of the same view of a tensor without data."""
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
    """Axes of a view ``part`` of the contiguous tensor ``whole``."""
    covered = [covers(whole, part.stride(d), part.shape[d]) for d in range(part.ndim)]
    for lost in axes.all - set().union(
        *covered
    ):  # cut to one row or column: told by its stride alone
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
    """The dimensions of a contiguous tensor that one dimension of a view runs through."""
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


@contextmanager
def modes_off() -> Iterator[None]:
    """No mode of torch sees what is done in here."""
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        if (
            torch._C._len_torch_dispatch_stack()
        ):  # private: as torch.utils._python_dispatch uses it in 2.13
            stack.enter_context(_disable_current_modes())
        yield
