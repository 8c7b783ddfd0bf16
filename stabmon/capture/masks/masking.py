"""Which scores a model has masked, whatever it holds there: told by what it did, and by whether a
softmax can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.masks.unreachable import NEGLIGIBLE, far_below
from stabmon.capture.protocol import bind

Cells = Callable[[], Tensor | None]
"""Gives, when asked, the cells of a tensor that have been masked, of its shape; None for none."""


def nothing() -> None:
    """No cell."""


def held(tensor: Tensor) -> Callable[[], Tensor | None]:
    """``tensor``, as long as nobody has changed it since."""
    version = None if tensor.is_inference() else tensor._version
    return lambda: tensor if version is None or tensor._version == version else None


def either(cells: Cells, other: Cells) -> Cells:
    """The cells of both."""

    def joined() -> Tensor | None:
        a, b = cells(), other()
        return b if a is None else a if b is None else a | b

    return joined


def lowered(values: Tensor, sign: float = 1.0) -> Cells:
    """Cells that adding ``values`` masks."""
    if values.ndim == 0 or not values.is_floating_point():
        return nothing
    get = held(values)

    def cells() -> Tensor | None:
        given = get()
        return None if given is None else far_below(sign * given)

    return cells


def chosen(mask: object, *, where: bool) -> Cells:
    """The cells at which a bool mask is ``where``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return nothing
    get = held(mask)

    def cells() -> Tensor | None:
        given = get()
        return given if given is None or where else ~given

    return cells


def replayed(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
    cells: Cells,
    part: int | None = None,
) -> Cells:
    """The cells after ``tensor`` went through a view or another choice of its elements."""
    shape = tensor.shape
    places = (
        [i for i, value in enumerate(args) if value is tensor],
        [k for k, value in kwargs.items() if value is tensor],
    )
    given = [
        None if value is tensor else value for value in args
    ]  # the tensor itself is not to be kept alive
    named = {k: None if value is tensor else value for k, value in kwargs.items()}

    def moved() -> Tensor | None:
        before = cells()
        if before is None:
            return None
        before = before.expand(shape).contiguous()  # any view can be taken of it
        own = [before if i in places[0] else value for i, value in enumerate(given)]
        result: Any = function(
            *own, **{k: before if k in places[1] else value for k, value in named.items()}
        )
        picked: Tensor = result if part is None else result[part]
        return picked

    return moved if cells is not nothing else nothing


def joined(
    function: Callable[..., Any],
    pieces: list[tuple[torch.Size, torch.device, Cells | None]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Cells:
    """The cells of tensors joined by ``cat`` or ``stack``; a piece that is no product is masked as
    a whole, if its values say so.
    """
    rest, named = args[1:], {k: v for k, v in kwargs.items() if k != "tensors"}

    def together() -> Tensor | None:
        parts = []
        for shape, device, cells in pieces:
            own = torch.ones((), dtype=torch.bool, device=device) if cells is None else cells()
            own = torch.zeros((), dtype=torch.bool, device=device) if own is None else own
            parts.append(own.expand(shape))
        result: Tensor = function(parts, *rest, **named)
        return result

    return nothing if all(cells is nothing for _, _, cells in pieces) else together


def padded(args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Tensor, cells: Cells) -> Cells:
    """The cells of a padded tensor, and the padding."""
    given = bind(("input", "pad", "mode", "value"), args, kwargs)
    shape, device = tensor.shape, tensor.device
    if given.get("mode", "constant") != "constant":
        return nothing

    def around() -> Tensor:
        own = cells()
        own = torch.zeros((), dtype=torch.bool, device=device) if own is None else own
        return torch.nn.functional.pad(own.expand(shape), given["pad"], value=True)

    return around


def written(
    shape: torch.Size,
    device: torch.device,
    before: Cells | None,
    put: Callable[[Tensor, Tensor], None],
    cells: Cells,
) -> Cells:
    """The cells of a buffer after one part of it was written; ``before`` is None where none of it
    was a score: then all else is masked.
    """

    def after() -> Tensor:
        none = torch.zeros((), dtype=torch.bool, device=device)
        known, own = ~none if before is None else before(), cells()
        whole = (none if known is None else known).expand(shape).contiguous().clone()
        put(whole, none if own is None else own)
        return whole

    return after


def conceal(scores: Tensor, cells: Tensor) -> Tensor:
    """Put at -inf those masked cells that no softmax of ``scores`` ``[B, H, Q, K]`` can tell from
    -inf.
    """
    shown = scores.clone()
    margin = NEGLIGIBLE + math.log(max(1, scores.shape[-1]))
    for entry, masked in zip(shown, cells.expand(scores.shape), strict=True):
        free = ~masked & (entry > torch.finfo(entry.dtype).min / 2)
        top = entry.masked_fill(~free, -torch.inf).amax(-1, keepdim=True)
        least = entry.masked_fill(~free, torch.inf).amin((-1, -2), keepdim=True)
        limit = torch.where(top.isneginf(), least, top) - margin
        entry.masked_fill_(masked & (entry <= limit) & ~least.isposinf(), -torch.inf)
    return shown
