"""Location of the parameters that make the query and the key of each head.

H query heads, G of them to a key head, D head dimension.

Nothing here is known for certain: names and shapes propose, and
:mod:`stabmon.interventions.run.score_replay` proves by running the step's batch again. Where not
even a proposal can be made, the error says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stabmon.model_names import (
    FUSED_PROJECTIONS,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    KEY_NORMS,
    KEY_PROJECTIONS,
    QUERY_NORMS,
    QUERY_PROJECTIONS,
)
from stabmon.projections.adapter_modules import base_of, is_adapter, is_frozen, is_transposed
from stabmon.projections.adapters import EffectiveUpdate, EffectiveWeight
from stabmon.projections.head_layouts import (
    SEPARATE,
    fused_layouts,
    fused_orders,
    multihead_layout,
    separate_layout,
)
from stabmon.projections.head_rows import QueryKey, Rows
from stabmon.projections.norm_gains import behind_norm, gain_and_bias
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import LayerInfo


def find_query_key(module: nn.Module, info: LayerInfo | None = None) -> list[QueryKey]:
    """Return proposals of what makes an attention module's queries and keys.

    Args:
        module: the module that attends.
        info: facts of its heads from capture; without it they are read from the module and its
            config.

    Returns:
        Proposals, the likeliest first.

    Raises:
        NotApplicable: naming what is missing or in the way.
    """
    heads, width = _heads(module, info)
    if isinstance(module, nn.MultiheadAttention):
        return [multihead_layout(module)]
    query_name, query = _child(module, QUERY_PROJECTIONS)
    if query is not None:
        _, key = _child(module, KEY_PROJECTIONS)
        found = [separate_layout(query_name, query, key, heads, width)]
    else:
        name, fused = _child(module, FUSED_PROJECTIONS)
        if fused is None:
            raise NotApplicable(
                f"{type(module).__name__} has no projection of queries that is known by its name",
                SEPARATE,
            )
        found = fused_layouts(name, fused, heads, width)
    name, norm = _child(module, QUERY_NORMS)
    if norm is None or isinstance(norm, nn.Identity):
        return found
    _, key_norm = _child(module, KEY_NORMS)
    others = [*found[0].all_rows(), *([] if key_norm is None else gain_and_bias(key_norm))]
    first = found[0].query[0][0]
    return [behind_norm(name, norm, heads, width or first.stop - first.start, others)]


def find_effective(module: nn.Module, info: LayerInfo | None = None) -> EffectiveUpdate | None:
    """Return the queries and keys that adapters around frozen projections make.

    Args:
        module: the module that attends.
        info: facts of its heads from capture.

    Returns:
        None where there are no adapters.

    Raises:
        NotApplicable: for adapters of an unknown kind.
    """
    projections = _projections(module)
    if not any(map(is_adapter, projections)):
        return None
    name, fused = _child(module, FUSED_PROJECTIONS)
    if fused is None or projections != [fused]:
        return EffectiveUpdate([EffectiveWeight(each) for each in projections])
    heads, width = _heads(module, info)
    base: Any = base_of(fused)
    out = base.weight.shape[1] if is_transposed(base) else getattr(base, "out_features", 0)
    orders, width, _ = fused_orders(name, int(out), heads, width)
    queries, keys = next(iter(orders.values()))
    spans: list[list[int]] = []
    for start in sorted([*queries, *keys]):
        if spans and spans[-1][1] == start:
            spans[-1][1] += width
        else:
            spans.append([start, start + width])
    return EffectiveUpdate([EffectiveWeight(fused, slice(*span)) for span in spans])


def is_adapted(module: nn.Module) -> bool:
    """Return True if what makes queries or keys is frozen, with or without adapters.

    No intervention reaches its weights then.
    """
    if isinstance(module, nn.MultiheadAttention):
        together = module.in_proj_weight
        return not (module.q_proj_weight if together is None else together).requires_grad
    return any(map(is_frozen, _projections(module)))


def trained_rows(module: nn.Module, info: LayerInfo | None = None) -> list[Rows]:
    """Return the rows by which training moves a layer's queries and keys.

    Those of the projections, or of the adapters around them.

    Args:
        module: the module that attends.
        info: facts of its heads from capture.

    Raises:
        NotApplicable: naming what is missing or in the way.
    """
    effective = find_effective(module, info)
    if effective is not None:
        return [Rows(each, 0, 0, each.shape[0]) for each in effective.trained]
    return find_query_key(module, info)[0].all_rows()


def _heads(module: nn.Module, info: LayerInfo | None) -> tuple[int, int | None]:
    """Return H and, where known, D."""
    if info is not None:
        return info.heads, info.head_dim
    for owner in (module, getattr(module, "config", None)):
        for name in HEAD_COUNTS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                widths = (getattr(module, each, None) for each in HEAD_WIDTHS)
                return heads, next((each for each in widths if isinstance(each, int)), None)
    raise NotApplicable(
        f"{type(module).__name__} does not tell how many heads it has",
        "give it an attribute num_heads",
    )


def _child(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module | None]:
    """Return the first child with one of these names, and its name."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return name, child
    return "", None


def _projections(module: nn.Module) -> list[nn.Module]:
    """Return the modules that make queries and keys: two, or one for both."""
    _, query = _child(module, QUERY_PROJECTIONS)
    names = (FUSED_PROJECTIONS,) if query is None else (QUERY_PROJECTIONS, KEY_PROJECTIONS)
    found = (_child(module, each)[1] for each in names)
    return [each for each in found if each is not None]
