"""Move vectors between ranks, on a process group of stabmon's own where there can be one."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stabmon._torch.process_group import collective_device, default_store, rank, world_size

logger = logging.getLogger("stabmon")

MOST_RANKS = 256
"""Ranks up to which a group of stabmon's own is made: each opens a connection to each other."""
LONGEST_WAIT = 120.0
"""Seconds for which a rank waits for others at most."""
GATHERED = 1 << 18
"""Numbers up to which vectors of all ranks are gathered in one collective (2 MiB).

Longer ones take two: one that adds and one that compares, whose length does not grow with the
number of ranks.
"""


def longest_wait() -> timedelta:
    """Return how long a rank waits for others: a quarter of the process group's own timeout.

    While it waits, others wait for it in training's collectives, whose timeout ends the run.
    """
    # the timeout of the default group has no public name (checked with torch 2.13); without it,
    # the longest wait is taken
    try:
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        seconds = backend.options._timeout.total_seconds() / 4
    except Exception:
        seconds = LONGEST_WAIT
    return timedelta(seconds=min(seconds, LONGEST_WAIT))


class Transport:
    """Collectives of float64 vectors on the host, over all ranks.

    On a gloo group of its own, apart from training's: a rank that fails to come to a collective of
    stabmon then disturbs none of training's, and those that wait get an error after
    :func:`longest_wait`. It is not registered with torch, so that it takes no number from groups
    that training makes. With more than ``MOST_RANKS`` ranks, or a torch without gloo, the default
    group is used, and its timeout.

    Args:
        name: the same on all ranks, and another for each transport of a process.
    """

    def __init__(self, name: str) -> None:
        self.count = 0
        """Collectives made so far."""
        self._group: Any = None
        store = default_store()
        if store is not None and world_size() <= MOST_RANKS and dist.is_gloo_available():
            own = dist.distributed_c10d.PrefixStore(name, store)
            self._group = dist.ProcessGroupGloo(own, rank(), world_size(), longest_wait())

    def largest(self, vector: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks of ``[n]`` float64 without NaN."""
        return self._reduce(vector, dist.ReduceOp.MAX)

    def add_and_compare(self, added: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of one vector and the maximum of another over ranks.

        One collective where all vectors together have at most ``GATHERED`` numbers; else two.

        Args:
            added: ``[n]`` float64.
            largest: ``[m]`` float64, without NaN.
        """
        both = torch.cat([added, largest])
        if len(both) * world_size() > GATHERED:
            return self._reduce(added, dist.ReduceOp.SUM), self.largest(largest)
        self.count += 1
        parts = [torch.empty_like(both) for _ in range(world_size())]
        if self._group is not None:
            self._group.allgather([parts], [both]).wait()
        else:
            device = collective_device()
            parts = [part.to(device) for part in parts]
            dist.all_gather(parts, both.to(device))
        sums, maxima = torch.stack(parts).cpu().split([len(added), len(largest)], dim=1)
        return sums.sum(0), maxima.amax(0)

    def copy_from(self, tensor: Tensor, source: int) -> None:
        """Set a tensor to that of a rank, bit for bit; of the same shape and type on all ranks."""
        self.count += 1
        device = collective_device() if self._group is None else torch.device("cpu")
        value = tensor.detach().to(device, copy=True).contiguous()
        if self._group is None:
            dist.broadcast(value, source)
        else:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self._group.broadcast([value], options).wait()
        tensor.detach().copy_(value)

    def close(self) -> None:
        """Close the connections: whoever waits for this rank stops at once."""
        self._group = None

    def _reduce(self, vector: Tensor, op: Any) -> Tensor:
        self.count += 1
        if self._group is None:
            vector = vector.to(collective_device())
            dist.all_reduce(vector, op)
            return vector.cpu()
        options = dist.AllreduceOptions()
        options.reduceOp = op
        vector = vector.clone()
        self._group.allreduce([vector], options).wait()
        return vector
