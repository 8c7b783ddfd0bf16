"""Scores that a model has masked, whatever values it gave them.

The masked cells of a tensor follow it through views, joins and writes. They are computed only when
they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.protocol import bind

Cells = Callable[[], Tensor | None]
"""Returns, when called, the masked cells of a tensor as bool of its shape; None for none."""

NEGLIGIBLE = 16.0
"""A masked key this many nats, and ln of the number of keys, below the largest visible score of its
row has no influence: together they hold less than 2e-7 of the probability."""
CLEAR = 10.0
"""Values fall into visible and masked ones where the gap between the two is this many times as wide
as the range of the visible ones.
"""
LEVELS = 4
"""Levels of masked values that are looked for: masks added to each other give several."""


def far_below(values: Tensor) -> Tensor | None:
    """Return where an additive mask masks, None for nowhere.

    Masked values lie far below all others, which differ little among themselves (0 and -1e4). A
    bias that falls steadily, as one by distance does, has no such gap.
    """
    masked = values <= torch.finfo(values.dtype).min / 2
    high = values.amax()
    left = torch.where(masked, high, values)
    found = False
    for _ in range(LEVELS):
        low = left.amin()
        if not bool((high - low > NEGLIGIBLE).item()):
            break
        upper = left > high - (high - low) / 4
        least = left.masked_fill(~upper, torch.inf).amin()
        most = left.masked_fill(upper, -torch.inf).amax()
        if not bool((least - most > CLEAR * (high - least)).item()):
            break
        masked, left, found = masked | ~upper, torch.where(upper, left, high), True
    return masked if found else None


def no_cells() -> None:
    """Return no cell."""


def held(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Return a function that returns ``tensor``, as long as nobody has changed it."""
    # Private, checked with torch 2.13: counts in-place writes; reading it raises for inference
    # tensors. Without it a mask that the model reuses would be read with later values.
    version = None if tensor.is_inference() else tensor._version
    return lambda: tensor if version is None or tensor._version == version else None


def either(cells: Cells, other: Cells) -> Cells:
    """Return the cells of both."""

    def both() -> Tensor | None:
        a, b = cells(), other()
        return b if a is None else a if b is None else a | b

    return both


def lowered(values: Tensor, sign: float = 1.0) -> Cells:
    """Return the cells that are masked by adding ``sign * values``."""
    if values.ndim == 0 or not values.is_floating_point():
        return no_cells
    get = held(values)

    def cells() -> Tensor | None:
        given = get()
        return None if given is None else far_below(sign * given)

    return cells


def chosen(mask: object, *, where: bool) -> Cells:
    """Return the cells at which a bool mask is ``where``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return no_cells
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
    """Return the cells after a view of ``tensor``, or another choice of its elements.

    Args:
        function: the operation, made again on the cells.
        args: its positional arguments.
        kwargs: its named arguments.
        tensor: the one among the arguments whose cells are known; not kept alive.
        cells: its cells.
        part: which of several results; None where there is one.
    """
    if cells is no_cells:
        return no_cells
    shape = tensor.shape
    at = [i for i, value in enumerate(args) if value is tensor]
    at_names = [k for k, value in kwargs.items() if value is tensor]
    given = [None if value is tensor else value for value in args]
    named = {k: None if value is tensor else value for k, value in kwargs.items()}

    def moved() -> Tensor | None:
        before = cells()
        if before is None:
            return None
        before = before.expand(shape).contiguous()  # any view can be taken of it
        own = [before if i in at else value for i, value in enumerate(given)]
        own_named = {k: before if k in at_names else value for k, value in named.items()}
        result: Any = function(*own, **own_named)
        picked: Tensor = result if part is None else result[part]
        return picked

    return moved


def joined(
    function: Callable[..., Any],
    pieces: list[tuple[torch.Size, torch.device, Cells | None]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Cells:
    """Return the cells of tensors joined by ``cat`` or ``stack``.

    Args:
        function: the join.
        pieces: shape, device and cells of each tensor; the cells are None for one that is no
            product, and is masked as a whole if its values are low enough.
        args: positional arguments of the join.
        kwargs: its named arguments.
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

    return no_cells if all(cells is no_cells for _, _, cells in pieces) else together


def padded(args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Tensor, cells: Cells) -> Cells:
    """Return the cells of a tensor padded by a constant: its own, and the padding."""
    given = bind(("input", "pad", "mode", "value"), args, kwargs)
    shape, device = tensor.shape, tensor.device
    if given.get("mode", "constant") != "constant":
        return no_cells

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
    """Return the cells of a buffer after one part of it was written.

    Args:
        shape: the buffer's.
        device: the buffer's.
        before: its cells until now; None where none of it was a score: then all else is masked.
        put: writes its second argument into the same part of its first.
        cells: those of what was written.
    """

    def after() -> Tensor:
        none = torch.zeros((), dtype=torch.bool, device=device)
        known, own = ~none if before is None else before(), cells()
        whole = (none if known is None else known).expand(shape).contiguous().clone()
        put(whole, none if own is None else own)
        return whole

    return after
