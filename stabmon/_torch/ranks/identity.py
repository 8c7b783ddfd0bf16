"""Tell replicas of a model from its stages and shards."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from stabmon._torch.tensors import is_sharded

_TENSORS, _VALUES = 8, 1024
"""Tensors, and values of each, whose bits are compared."""


@torch.no_grad()
def weights_digest(model: nn.Module) -> int:
    """Return a number below 2^48 that replicas of a model have in common, and its stages have not.

    It is of the names, shapes and placements of all parameters and of the bits of some. Data-parallel
    ranks start from the same weights and make the same steps; stages of a pipeline may have the same
    names and shapes, but not the same values. Of sharded parameters, whose part here is another on
    each rank, only name, shape and placement count.
    """
    found = hashlib.sha256()
    whole = []
    for name, each in model.named_parameters():
        clean = name.replace("_orig_mod.", "").removeprefix("module.")
        found.update(f"{clean} {tuple(each.shape)} {each.dtype}".encode())
        if is_sharded(each):
            found.update(str(each.placements).encode())  # type: ignore[attr-defined]
        elif each.ndim > 1 and each.is_floating_point():
            whole.append(each)
    for each in whole[:: max(1, len(whole) // _TENSORS)]:
        flat = each.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // _VALUES)].double().cpu()
        found.update(values.numpy().tobytes())
    return int.from_bytes(found.digest()[:6], "big")


def has_split_heads(model: nn.Module) -> bool:
    """Return whether each rank has other heads, as under tensor parallelism."""
    meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
    named = any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes if mesh is not None)
    sharded = any(is_sharded(each) for each in model.parameters())
    return named or (sharded and not is_fully_sharded(model))


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether FSDP shards the model: its forwards gather parameters from other ranks."""
    names = {kind.__name__ for each in model.modules() for kind in type(each).__mro__}
    return not names.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def joins_unequal_batches(model: nn.Module) -> bool:
    """Return whether training runs under ``Join``, so that ranks may end at different steps."""
    # DistributedDataParallel keeps the setting of a Join context in _join_config (checked with
    # torch 2.13); without it, a rank that has ended early is missed by the others' longest wait
    configs = (getattr(each, "_join_config", None) for each in model.modules())
    return any(bool(getattr(config, "enable", False)) for config in configs)
