"""Tell replicas of a model from its stages and shards."""

from __future__ import annotations

import hashlib
import math
import sys
from typing import Any

import torch
from torch import nn

from stabmon._torch.process_group import rank
from stabmon._torch.tensors import is_sharded, local

_TENSORS, _VALUES = 8, 1024
"""Tensors, and values of each, whose bits are compared."""


@torch.no_grad()
def weights_digest(model: nn.Module, *, parts: bool = False) -> int:
    """Return a number below 2^48 that replicas of a model have in common, and its stages have not.

    It is of the names, shapes and placements of all parameters and of the bits of some. Data-parallel
    ranks start from the same weights and make the same steps; stages of a pipeline may have the same
    names and shapes, but not the same values.

    Args:
        model: the model.
        parts: the bits of sharded parameters' parts here count as well. Else only their name, shape
            and placement do, since each rank has another part.
    """
    found = hashlib.sha256()
    whole = []
    for name, each in model.named_parameters():
        clean = name.replace("_orig_mod.", "").removeprefix("module.")
        found.update(f"{clean} {tuple(each.shape)} {each.dtype}".encode())
        if is_sharded(each):
            found.update(str(each.placements).encode())  # type: ignore[attr-defined]
        if each.ndim > 1 and each.is_floating_point() and (parts or not is_sharded(each)):
            whole.append(each)
    for each in whole[:: max(1, len(whole) // _TENSORS)]:
        flat = local(each.detach()).reshape(-1)
        values = flat[:: max(1, len(flat) // _VALUES)].double().cpu()
        found.update(values.numpy().tobytes())
    return int.from_bytes(found.digest()[:6], "big")


def has_split_heads(model: nn.Module) -> bool:
    """Return whether each rank may have other heads, as under tensor parallelism."""
    gathered = gathered_dims(model)
    return any(_sharded_dims(each, gathered) for each in model.parameters())


def head_shard(module: nn.Module, heads: int, head_dim: int, gathered: set[str] | None) -> int:
    """Return which shard of a layer's heads this rank computes; 0 where it computes all.

    It follows from the placement of the largest weight whose rows are sharded, which is W_q or
    holds it, on the dimensions of its mesh, whatever they are called.

    Args:
        module: the attention module.
        heads: the number of heads of its attention here.
        head_dim: features of a head.
        gathered: see :func:`gathered_dims`.
    """
    rows = [
        (each, dims)
        for each in module.parameters()
        if each.ndim == 2 and (dims := _sharded_dims(each, gathered, of=0))
    ]
    if not rows:
        return 0
    weight, dims = max(rows, key=lambda each: each[0].shape[0])
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    parts = math.prod(mesh.size(dim) for dim in dims)
    if heads * head_dim * parts > weight.shape[0]:
        return 0  # its output is gathered: all heads are here
    index = 0
    for dim in dims:
        index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return int(index)


def gathered_dims(model: nn.Module) -> set[str] | None:
    """Return the names of the mesh dimensions that FSDP shards over, whose shards it gathers.

    None where FSDP does not shard the model; empty where its dimensions have no names.
    """
    if not is_fully_sharded(model):
        return None
    names: set[str] = set()
    for each in model.modules():
        # FSDP2 keeps its mesh in its state (checked with torch 2.13); without it all dimensions of
        # a mesh count as gathered, and heads of FSDP over tensor parallel are numbered from 0
        state = getattr(each, "_get_fsdp_state", lambda: None)()
        for group in getattr(state, "_fsdp_param_groups", ()):
            info = group.mesh_info
            dims = getattr(info, "dp_mesh_dims", None)
            given = [info.mesh.mesh_dim_names] if dims is None else list(vars(dims).values())
            for name in given:
                names |= {name} if isinstance(name, str) else set(name or ())
    return names


def mesh_ranks(model: nn.Module) -> list[int]:
    """Return the ranks over which the model's parameters are sharded or replicated by a mesh."""
    meshes = {id(m): m for p in model.parameters() if (m := getattr(p, "device_mesh", None))}
    found = {int(each) for mesh in meshes.values() for each in mesh.mesh.flatten().tolist()}
    return sorted(found) or [rank()]


def _sharded_dims(parameter: Any, gathered: set[str] | None, of: int | None = None) -> list[int]:
    """Return the mesh dimensions that shard a parameter and are not gathered for a forward.

    Args:
        parameter: the parameter.
        gathered: see :func:`gathered_dims`.
        of: the dimension of the parameter that they shard; None for any.
    """
    if not is_sharded(parameter):
        return []
    mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names
    if gathered is not None and (names is None or not gathered):
        return []
    return [
        dim
        for dim, placement in enumerate(parameter.placements)
        if "Shard" in type(placement).__name__
        and (of is None or placement.dim % parameter.ndim == of)
        and (gathered is None or names[dim] not in gathered)
        and mesh.size(dim) > 1
    ]


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether FSDP shards the model: its forwards gather parameters from other ranks."""
    names = {kind.__name__ for each in model.modules() for kind in type(each).__mro__}
    return not names.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def has_flat_shards(model: nn.Module) -> bool:
    """Return whether FSDP1 shards the model, whose parts belong to no single parameter."""
    names = {kind.__name__ for each in model.modules() for kind in type(each).__mro__}
    return "FullyShardedDataParallel" in names


def runs_context_parallel() -> bool:
    """Return whether torch's context parallel is in force now, so that keys lie on several ranks."""
    # its context replaces the handlers of DTensor's dispatcher by others than existing_custom_ops
    # (checked with torch 2.13); without these names context parallel is not noticed, and the scores
    # of each rank's own keys are read
    private = "torch.distributed.tensor.experimental._context_parallel._attention"
    module: Any = sys.modules.get(private)
    if module is None or not hasattr(module, "existing_custom_ops"):
        return False
    dispatcher = getattr(module.DTensor, "_op_dispatcher", None)
    handlers = getattr(dispatcher, "_custom_op_handlers", module.existing_custom_ops)
    return handlers is not module.existing_custom_ops


def joins_unequal_batches(model: nn.Module) -> bool:
    """Return whether training runs under ``Join``, so that ranks may end at different steps."""
    # DistributedDataParallel keeps the setting of a Join context in _join_config (checked with
    # torch 2.13); without it, a rank that has ended early is missed by the others' longest wait
    configs = (getattr(each, "_join_config", None) for each in model.modules())
    return any(bool(getattr(config, "enable", False)) for config in configs)
