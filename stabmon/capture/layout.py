"""Leading dimensions of queries, keys and scores laid out as batch and heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stabmon.model_names import HEAD_COUNTS

Layout = Callable[[Tensor], Tensor]
"""Lays out ``[..., L, D]`` as ``[B, H, L, D]``."""


def head_count(module: nn.Module) -> int | None:
    """Return the number of heads that a module states, None where it states none."""
    for name in HEAD_COUNTS:
        heads = getattr(module, name, None)
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
            return heads
    return None


def layout(
    shape: torch.Size, module: nn.Module, *, grouped: bool = False, operand: Tensor | None = None
) -> Layout:
    """Return a function that lays out tensors like ``shape`` by batch and head.

    One leading dimension is batch times the heads that ``module`` has, or batch alone. Of three or
    more, the first is batch and the others are heads where they make up the module's number of
    heads or ``grouped`` says so; else one of them is heads, and the others (windows, blocks) are
    batch: see :func:`head_dimension`.

    Args:
        shape: ``[..., L, D]``.
        module: the module that attends.
        grouped: whether all but the first leading dimension are heads.
        operand: a query or key with these leading dimensions, if there is one.

    Returns:
        Turns ``[..., L, D]`` into ``[B, H, L, D]``; L and D may differ from those of ``shape``.
    """
    heads = head_count(module)
    if len(shape) == 3:
        folded = heads if heads is not None and shape[0] % heads == 0 else 1
        return lambda tensor: tensor.reshape(-1, folded, *tensor.shape[1:])
    if len(shape) > 4:
        if grouped or (heads == shape[1:-2].numel() and heads not in shape[1:-2]):
            return lambda tensor: tensor.flatten(1, -3)
        place = head_dimension(shape, heads, operand)
        return lambda tensor: with_heads(tensor.movedim(place, -3))
    return with_heads


def head_dimension(shape: torch.Size, heads: int | None, operand: Tensor | None) -> int:
    """Return the one of several leading dimensions that is the heads.

    It is the one of the size that the module states. Among equals, and where it states nothing, it
    is the one that lies beside the head dimension in the memory of ``operand``, as a projection has
    put it there; else the last.
    """
    fitting = [d for d in range(len(shape) - 2) if shape[d] == heads] or list(range(len(shape) - 2))
    if operand is not None and operand.ndim == len(shape) and operand.stride(-1) == 1:
        beside = [d for d in fitting if shape[d] > 1 and operand.stride(d) == operand.shape[-1]]
        if len(beside) == 1:
            return beside[0]
    return fitting[-1]


def with_heads(tensor: Tensor) -> Tensor:
    """Return ``[..., H, L, D]`` as ``[B, H, L, D]``.

    Dimensions before the heads are batch, and a missing one has size 1.
    """
    while tensor.ndim < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)
