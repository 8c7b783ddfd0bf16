"""Default process group of torch.distributed, where there is one."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return this process's rank; 0 outside of torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_all_ranks(ready: bool) -> bool:
    """Return whether every rank is ``ready``; one collective for every rank to call."""
    if world_size() == 1:
        return ready
    return bool(gather(torch.tensor([float(ready)], dtype=torch.float64)).all())


def gather(vector: Tensor) -> Tensor:
    """Return ``[ranks, length]`` on the CPU, from ``[length]`` of each rank."""
    vector = vector.to(collective_device())
    parts = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vector)
    return torch.stack(parts).cpu()


def collective_device() -> torch.device:
    """Return the device on which the default process group takes its tensors."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def default_store() -> Any:
    """Return the key-value store through which the process group was set up."""
    # the store of init_process_group, which has no public name (checked with torch 2.13); gone,
    # ranks cannot announce a failure, and None is returned
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    store = None if get is None else get()
    return store if store is None or not (attempt := _attempt()) else _of_attempt(store, attempt)


def _of_attempt(store: Any, attempt: int) -> Any:
    """Return the part of a store that no earlier attempt of a restarted run has written to."""
    return dist.distributed_c10d.PrefixStore(f"stabmon/attempt {attempt}", store)


def _attempt() -> int:
    """Return how often torchrun has restarted the ranks of this run on one machine.

    Its store outlives them (checked with torch 2.13, rendezvous ``c10d``): ranks would meet at
    addresses of dead ones, and read their words. On several machines counts may differ, and 0 is
    returned.
    """
    given = [
        os.environ.get(name, "")
        for name in ("TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    ]
    count, here, everywhere = given
    return int(count) if count.isdigit() and here == everywhere else 0
