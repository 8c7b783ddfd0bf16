"""Parts of tensors that each rank holds, and what they count in a sum over ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stabmon._torch.process_group import world_size
from stabmon._torch.tensors import is_sharded


def share_of(tensor: Tensor) -> float:
    """Return the factor by which this rank's part counts in a sum over all ranks.

    One over the number of ranks that hold the same part, so that each element counts once: of a
    tensor sharded over all ranks 1, of one that each rank holds whole one over their number.

    Raises:
        ValueError: if the tensor is a part of a sum that is yet to be taken.
    """
    sizes = 1
    if is_sharded(tensor):
        each: Any = tensor
        for dim, placement in enumerate(each.placements):
            if "Partial" in type(placement).__name__:
                raise ValueError("its ranks hold summands")
            sizes *= each.device_mesh.size(dim) if "Shard" in type(placement).__name__ else 1
    return sizes / world_size()


def local_rows(tensor: Tensor, dim: int, start: int, stop: int) -> slice | None:
    """Return the range of rows along a dimension that lies in this rank's part.

    Args:
        tensor: any tensor.
        dim: the dimension of the rows.
        start: first row of the whole tensor.
        stop: the row after the last.

    Returns:
        A range of the local part, which may be empty; None where the layout is not known here.
    """
    if not is_sharded(tensor):
        return slice(start, stop)
    each: Any = tensor
    sharded = [
        at
        for at, placement in enumerate(each.placements)
        if "Shard" in type(placement).__name__ and placement.dim % tensor.ndim == dim
    ]
    if not sharded:
        return slice(start, stop)
    if len(sharded) > 1 or type(each.placements[sharded[0]]).__name__ != "Shard":
        return None
    size, own = each.device_mesh.size(sharded[0]), each.device_mesh.get_local_rank(sharded[0])
    chunk = -(-tensor.shape[dim] // size)
    first = min(own * chunk, tensor.shape[dim])
    count = each.to_local().shape[dim]
    low, high = max(start - first, 0), min(stop - first, count)
    return slice(low, max(low, high))
