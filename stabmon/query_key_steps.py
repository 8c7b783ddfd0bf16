"""How the weights that make queries and keys move in a sampled step: their gradient, their size, and what the optimizer changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stabmon.gradients import is_sharded
from stabmon.interventions import CannotApply
from stabmon.interventions.query_key import find_query_key
from stabmon.records import LayerInfo, QueryKeyStep


class QueryKeySteps:
    """Takes the norms of W_q and W_k before the optimizer's step, and of their change after it.

    Layers whose queries and keys cannot be told apart by name and shape, or are sharded, are left out. Costs a copy of W_q and W_k from
    one mark to the other at sampled steps, and one transfer to the host.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[nn.Parameter, int, slice]]] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def before(self, layers: Mapping[str, nn.Module], info: Mapping[str, LayerInfo], again: bool = False) -> None:
        """Gradients are ready, the optimizer has not stepped; ``again``, before another optimizer's step, for layers that had none."""
        if not again:
            self._before, self._norms = {}, {}
        for layer, module in layers.items():
            if layer in self._before:
                continue
            if layer not in self._parts:
                self._parts[layer] = _parts_of(module, info.get(layer))
            parts = [(parameter, at) for parameter, dim, rows in self._parts[layer] for at in [(slice(None),) * dim + (rows,)]]
            if not parts or any(parameter.grad is None for parameter, _ in parts):
                continue
            weights = [parameter.detach()[at] for parameter, at in parts]
            gradients = [parameter.grad[at] for parameter, at in parts if parameter.grad is not None]
            self._before[layer] = [weight.clone() for weight in weights]
            self._norms[layer] = _norm(gradients), _norm(weights)

    @torch.no_grad()
    def after(self, scaled: bool = False) -> dict[str, QueryKeyStep]:
        """The optimizer has stepped; of ``scaled`` gradients it is not known whether they were unscaled when they were seen."""
        moved = {}
        for layer, before in self._before.items():
            now = [parameter.detach()[(slice(None),) * dim + (rows,)] for parameter, dim, rows in self._parts[layer]]
            moved[layer] = _norm(torch._foreach_sub(now, before))
        names = list(moved)
        self._before = {}
        if not names:
            return {}
        device = moved[names[0]].device
        table = torch.stack([torch.stack([*self._norms[name], moved[name]]).to(device).double() for name in names]).tolist()
        return {
            name: QueryKeyStep(gradient=math.nan if scaled else gradient, weight=weight, update=update)
            for name, (gradient, weight, update) in zip(names, table, strict=True)
        }


def _parts_of(module: nn.Module, info: LayerInfo | None) -> list[tuple[nn.Parameter, int, slice]]:
    """(parameter, dimension, range) of everything that makes queries and keys, neighbouring ranges joined."""
    try:
        rows = find_query_key(module, info)[0].all_rows()
    except CannotApply:
        return []
    ranges: dict[tuple[int, int], tuple[nn.Parameter, list[tuple[int, int]]]] = {}
    for each in rows:
        if is_sharded(each.parameter):
            return []
        ranges.setdefault((id(each.parameter), each.dim), (each.parameter, []))[1].append((each.start, each.stop))
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
    return joined


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all of them together, on their device."""
    norms: Tensor = torch.linalg.vector_norm(torch.stack([each.float() for each in torch._foreach_norm(list(tensors))]))
    return norms
