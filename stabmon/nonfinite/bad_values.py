"""Counts and magnitudes of values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stabmon._torch.tensors import local


def count_bad(tensor: Tensor) -> str:
    """Return the counts of values that are not finite; the empty string if all are.

    Of a sharded tensor, this rank's part.

    Example:
        >>> count_bad(torch.tensor([1.0, float("nan"), float("inf")]))
        '1 NaN, 1 inf of 3'
    """
    tensor = local(tensor.detach())
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return ""
    counts = {"NaN": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())}
    found = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{found} of {tensor.numel()}"


def count_visible_bad(tensor: Tensor) -> str:
    """Return the same without values of -inf, which hide keys.

    For what goes into and out of modules.
    """
    tensor = local(tensor.detach())
    if not tensor.is_floating_point():
        return ""
    return count_bad(tensor.masked_fill(tensor == -torch.inf, 0))


def bad_heads(tensor: Tensor) -> list[int]:
    """Return the heads of ``[B, H, S, D]`` that hold a value that is not finite."""
    return indices((~tensor.isfinite()).flatten(2).any(dim=2).any(dim=0))


def indices(flags: Tensor) -> list[int]:
    """Return the indices at which a flat tensor of flags is true.

    >>> indices(torch.tensor([False, True, True]))
    [1, 2]
    """
    found: list[int] = flags.nonzero().flatten().tolist()
    return found


@torch.no_grad()
def largest_of(tensors: Sequence[Tensor], largest: Sequence[Tensor] = ()) -> list[float]:
    """Return the largest absolute value of each tensor, NaN where one is.

    One transfer to the host.

    Args:
        tensors: floating-point tensors on any devices.
        largest: numbers on devices to bring along, after those of the tensors.

    Example:
        >>> largest_of([torch.tensor([1.0, -3.0]), torch.tensor([])])
        [3.0, 0.0]
    """
    # shards can be empty, and have no largest value
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    found = [*largest_values(tensors), *largest]
    if not found:
        return []
    device = found[0].device
    values: list[float] = torch.stack([each.to(device) for each in found]).tolist()
    return values


def largest_values(tensors: list[Tensor]) -> list[Tensor]:
    """Return the largest absolute value of each tensor, on its device."""
    # one kernel for all tensors, as in clip_grad_norm_; checked with torch 2.13. Gone, replace it
    # by torch.linalg.vector_norm(each, math.inf), one kernel a tensor
    return list(torch._foreach_norm(tensors, math.inf)) if tensors else []


def all_finite(values: Sequence[float]) -> bool:
    """Return True if every number is finite."""
    return all(map(math.isfinite, values))
