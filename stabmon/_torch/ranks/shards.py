"""Parts of tensors that each rank holds, and what they count in a sum over ranks."""

from __future__ import annotations

import math
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
        (at, placement)
        for at, placement in enumerate(each.placements)
        if "Shard" in type(placement).__name__ and placement.dim % tensor.ndim == dim
    ]
    first, count = 0, tensor.shape[dim]
    # rows that tensor parallelism has split are split again by FSDP, whose mesh dimension comes first
    for at, placement in sorted(sharded, key=lambda pair: _is_strided(pair[1])):
        later = [each.device_mesh.size(other) for other, _ in sharded if other > at]
        known = math.prod(later) if _is_strided(placement) else 1
        if getattr(placement, "split_factor", 1) != known:
            return None
        size, own = each.device_mesh.size(at), each.device_mesh.get_local_rank(at)
        chunk = -(-count // size)
        first += min(own * chunk, count)
        count = min(chunk, max(0, count - own * chunk))
    if count != each.to_local().shape[dim]:
        return None
    low, high = (min(max(each - first, 0), count) for each in (start, stop))
    return slice(low, high)


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"
