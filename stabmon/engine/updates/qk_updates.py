"""Measure how W_q and W_k move in a sampled step: their gradient, size and change."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stabmon._torch.ranks.shards import local_rows, share_of
from stabmon._torch.tensors import is_sharded, local
from stabmon.interventions import NotApplicable
from stabmon.projections.adapters import EffectiveUpdate
from stabmon.projections.locate import find_effective, find_query_key, is_adapted
from stabmon.records import LayerInfo, QKUpdate

logger = logging.getLogger("stabmon")


class QKUpdates:
    """Norms of W_q and W_k before the optimizer's step, and of their change after it.

    Where adapters are around frozen projections, W_q and W_k are what these effectively are. Layers
    whose queries and keys cannot be told apart by name and shape are left out. Of sharded weights
    the norms are those of this rank's parts, whose squares ranks must add: see :attr:`partial`.
    Costs a copy of W_q and W_k, or of the adapters, from one mark to the other at sampled steps,
    and one transfer to the host.
    """

    def __init__(self) -> None:
        self.partial: set[str] = set()
        """Layers whose norms are of this rank's parts."""
        self._parts: dict[str, list[tuple[nn.Parameter, int, slice]]] = {}
        self._shares: dict[str, list[float]] = {}
        self._adapters: dict[str, EffectiveUpdate] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def before(
        self, layers: Mapping[str, nn.Module], info: Mapping[str, LayerInfo], again: bool = False
    ) -> None:
        """Copy the weights, once gradients are ready and before the optimizer steps.

        Args:
            layers: the attention modules by name.
            info: facts about the layers, by the same names.
            again: another optimizer is about to step: only layers without gradients so far.
        """
        if not again:
            self._before, self._norms = {}, {}
        for layer, module in layers.items():
            if layer in self._before:
                continue
            if layer not in self._parts:
                self._find(layer, module, info.get(layer))
            if layer in self._adapters:
                gradients = [
                    parameter.grad
                    for parameter in self._adapters[layer].trained
                    if parameter.grad is not None
                ]
                weight = self._adapter_norm(layer, "before") if gradients else None
                if weight is not None:
                    self._before[layer], self._norms[layer] = [], (_norm(gradients), weight)
                continue
            parts = [
                (parameter, at)
                for parameter, dim, rows in self._parts[layer]
                for at in [(slice(None),) * dim + (rows,)]
            ]
            if not parts or any(parameter.grad is None for parameter, _ in parts):
                continue
            weights = [local(parameter.detach())[at] for parameter, at in parts]
            gradients = [
                local(parameter.grad)[at] for parameter, at in parts if parameter.grad is not None
            ]
            self._before[layer], shares = [each.clone() for each in weights], self._shares[layer]
            self._norms[layer] = _norm(gradients, shares), _norm(weights, shares)

    @torch.no_grad()
    def after(self, scaled: bool = False) -> dict[str, QKUpdate]:
        """Compare the weights with their copies, after the optimizer has stepped.

        Args:
            scaled: a gradient scaler is in use, so that gradients may have been scaled when they
                were measured; their norm is then NaN.

        Returns:
            L2 norms of gradient, weights and update, by layer.
        """
        moved = {}
        for layer, before in self._before.items():
            if layer in self._adapters:
                change = self._adapter_norm(layer, "change")
                if change is not None:
                    moved[layer] = change
                continue
            now = [
                local(parameter.detach())[(slice(None),) * dim + (rows,)]
                for parameter, dim, rows in self._parts[layer]
            ]
            # torch._foreach_sub: one launch for all tensors (checked with torch 2.13)
            moved[layer] = _norm(torch._foreach_sub(now, before), self._shares[layer])
        names = list(moved)
        self._before = {}
        if not names:
            return {}
        device = moved[names[0]].device
        norms = [[*self._norms[name], moved[name]] for name in names]
        table = torch.stack(
            [torch.stack([each.to(device).double() for each in row]) for row in norms]
        ).tolist()
        return {
            name: QKUpdate(gradient=math.nan if scaled else gradient, weight=weight, update=update)
            for name, (gradient, weight, update) in zip(names, table, strict=True)
        }

    def trained(self) -> list[Tensor]:
        """Return the parameters measured so far: W_q and W_k, or the adapters on them."""
        own = [parameter for parts in self._parts.values() for parameter, *_ in parts]
        return [*own, *(each for found in self._adapters.values() for each in found.trained)]

    def _adapter_norm(self, layer: str, measure: Literal["before", "change"]) -> Tensor | None:
        """Return a norm of a layer with adapters; drop the layer if that fails."""
        try:
            found: Tensor = getattr(self._adapters[layer], measure)()
        except Exception as error:  # adapters that were exchanged, or a base that takes no floats
            logger.info("updates of the adapters of %s are not measured: %s", layer, error)
            del self._adapters[layer]
            return None
        return found

    def _find(self, layer: str, module: nn.Module, info: LayerInfo | None) -> None:
        self._parts[layer] = []
        try:
            effective = find_effective(module, info)
        except NotApplicable:
            return
        if effective is None:
            parts = next(filter(None, (_parts_of(module, e) for e in by_shards(module, info))), [])
            self._parts[layer], self._shares[layer] = parts, [1.0] * len(parts)
            if any(is_sharded(parameter) for parameter in module.parameters()):
                self.partial.add(layer)
                self._shares[layer] = [share_of(parameter) for parameter, *_ in parts]
        else:
            self._adapters[layer] = effective


def with_adapters(
    info: Mapping[str, LayerInfo], modules: Mapping[str, nn.Module]
) -> dict[str, LayerInfo]:
    """Mark the layers whose queries and keys are made by frozen weights with adapters.

    Args:
        info: facts about layers, by name.
        modules: the attention modules, by name.
    """
    return {
        layer: replace(each, adapted=True) if _is_adapted(modules.get(layer)) else each
        for layer, each in info.items()
    }


def by_shards(module: nn.Module, info: LayerInfo | None) -> Iterator[LayerInfo | None]:
    """Return a layer's facts, and those with as many times more heads as ranks may hold others of.

    These are the sizes of the dimensions of the mesh over which its weights are sharded, the least
    first, and their product.
    """
    yield info
    if info is None:
        return
    sharded: list[Any] = [each for each in module.parameters() if is_sharded(each)]
    meshes = [each.device_mesh for each in sharded]
    sizes = {mesh.size(dim) for mesh in meshes for dim in range(mesh.ndim)}
    for size in sorted(sizes | {mesh.size() for mesh in meshes}):
        yield replace(info, heads=info.heads * size)


def _is_adapted(module: nn.Module | None) -> bool:
    try:
        return module is not None and is_adapted(module)
    except Exception:  # an attribute of somebody's module may raise whatever it likes
        return False


def _parts_of(module: nn.Module, info: LayerInfo | None) -> list[tuple[nn.Parameter, int, slice]]:
    """Return (parameter, dimension, rows) of W_q and W_k, adjacent rows joined."""
    try:
        rows = find_query_key(module, info)[0].all_rows()
    except NotApplicable:
        return []
    ranges: dict[tuple[int, int], tuple[nn.Parameter, list[tuple[int, int]]]] = {}
    for each in rows:
        ranges.setdefault((id(each.parameter), each.dim), (each.parameter, []))[1].append(
            (each.start, each.stop)
        )
    joined = []
    for (_, dim), (parameter, spans) in ranges.items():
        start, stop = None, None
        for low, high in sorted(spans):
            if stop is not None and low == stop:
                stop = high
                continue
            if start is not None:
                joined.append((parameter, dim, slice(start, stop)))
            start, stop = low, high
        joined.append((parameter, dim, slice(start, stop)))
    here = [
        (parameter, dim, local_rows(parameter, dim, rows.start, rows.stop))
        for parameter, dim, rows in joined
    ]
    known = [(parameter, dim, rows) for parameter, dim, rows in here if rows is not None]
    return known if len(known) == len(here) else []


def _norm(tensors: Sequence[Tensor], shares: Sequence[float] = ()) -> Tensor:
    """Return the L2 norm of all tensors together, on their device.

    Args:
        tensors: the tensors.
        shares: factor of each one's square; empty for 1.
    """
    # torch._foreach_norm: one launch for all tensors (checked with torch 2.13)
    norms = torch.stack([each.float() for each in torch._foreach_norm(list(tensors))])
    if any(share != 1 for share in shares):
        norms = norms * norms.new_tensor(shares).sqrt()
    whole: Tensor = torch.linalg.vector_norm(norms)
    return whole
