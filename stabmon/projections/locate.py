"""Which rows of which parameters make the query and the key of each head: H query heads, G of them
to a key head, D head dimension.

Nothing here is known for certain: names and shapes propose, and
:mod:`stabmon.interventions.run.score_replay` proves by running the step's batch again. Where not
even a proposal can be made, the reason is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from stabmon.model_names import (
    FUSED_PROJECTIONS,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    INTERLEAVED_PROJECTIONS,
    KEY_NORMS,
    KEY_PROJECTIONS,
    QUERY_NORMS,
    QUERY_PROJECTIONS,
)
from stabmon.projections.adapters import (
    EffectiveUpdate,
    EffectiveWeight,
    base_of,
    is_adapter,
    is_frozen,
    row_gain,
)
from stabmon.projections.head_rows import QueryKey, Rows
from stabmon.projections.norm_gains import behind_norm, gain_and_bias
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import LayerInfo

SEPARATE = (
    "give the attention module projections named q_proj and k_proj, or one named qkv in "
    "the order q, k, v"
)


def find_query_key(module: nn.Module, info: LayerInfo | None = None) -> list[QueryKey]:
    """What may make the queries and keys of an attention module, the likeliest first.

    Args:
        module: the module that attends.
        info: what capture has seen of its heads; without it they are looked up on the module and
            its config.

    Raises:
        NotApplicable: naming what is missing or in the way.
    """
    heads, width = _heads(module, info)
    if isinstance(module, nn.MultiheadAttention):
        return [_torch_multihead(module)]
    query_name, query = _child(module, QUERY_PROJECTIONS)
    if query is not None:
        _, key = _child(module, KEY_PROJECTIONS)
        found = [_separate(query_name, query, key, heads, width)]
    else:
        name, fused = _child(module, FUSED_PROJECTIONS)
        if fused is None:
            raise NotApplicable(
                f"{type(module).__name__} has no projection of queries that is known by its name",
                SEPARATE,
            )
        found = _fused(name, fused, heads, width)
    name, norm = _child(module, QUERY_NORMS)
    if norm is None or isinstance(norm, nn.Identity):
        return found
    _, key_norm = _child(module, KEY_NORMS)
    others = [*found[0].all_rows(), *([] if key_norm is None else gain_and_bias(key_norm))]
    return [behind_norm(name, norm, heads, width or _width(found[0]), others)]


def find_effective(module: nn.Module, info: LayerInfo | None = None) -> EffectiveUpdate | None:
    """What makes queries and keys by adapters around frozen projections; None where there are no
    adapters.

    Raises:
        NotApplicable: for adapters of a kind that is not known.
    """
    _, query = _child(module, QUERY_PROJECTIONS)
    _, key = _child(module, KEY_PROJECTIONS)
    name, fused = _child(module, FUSED_PROJECTIONS)
    if not any(is_adapter(each) for each in ((query, key) if query is not None else (fused,))):
        return None
    if query is not None:
        return EffectiveUpdate([EffectiveWeight(each) for each in (query, key) if each is not None])
    assert fused is not None
    heads, width = _heads(module, info)
    base: Any = base_of(fused)
    out = (
        base.weight.shape[1]
        if type(base).__name__ == "Conv1D"
        else getattr(base, "out_features", 0)
    )
    orders, width, _ = _orders(name, int(out), heads, width)
    queries, keys = next(iter(orders.values()))
    spans: list[list[int]] = []
    for start in sorted([*queries, *keys]):
        if spans and spans[-1][1] == start:
            spans[-1][1] += width
        else:
            spans.append([start, start + width])
    return EffectiveUpdate([EffectiveWeight(fused, slice(*span)) for span in spans])


def is_adapted(module: nn.Module) -> bool:
    """Whether what makes the queries or keys is frozen, with or without adapters around it, so that
    no act reaches its weights.
    """
    if isinstance(module, nn.MultiheadAttention):
        weight = (
            module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
        )
        return not weight.requires_grad
    query, key, fused = (
        _child(module, names)[1]
        for names in (QUERY_PROJECTIONS, KEY_PROJECTIONS, FUSED_PROJECTIONS)
    )
    return any(
        each is not None and is_frozen(each)
        for each in ((query, key) if query is not None else (fused,))
    )


def trained_rows(module: nn.Module, info: LayerInfo | None = None) -> list[Rows]:
    """What training moves of a layer's queries and keys: rows of the projections, or the adapters
    around them.

    Raises:
        NotApplicable: naming what is missing or in the way.
    """
    effective = find_effective(module, info)
    if effective is not None:
        return [Rows(each, 0, 0, each.shape[0]) for each in effective.trained]
    return find_query_key(module, info)[0].all_rows()


def _heads(module: nn.Module, info: LayerInfo | None) -> tuple[int, int | None]:
    """H and, where known, D."""
    if info is not None:
        return info.heads, info.head_dim
    for owner in (module, getattr(module, "config", None)):
        for name in HEAD_COUNTS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                width = next(
                    (
                        each
                        for n in HEAD_WIDTHS
                        if isinstance(each := getattr(module, n, None), int)
                    ),
                    None,
                )
                return heads, width
    raise NotApplicable(
        f"{type(module).__name__} does not tell how many heads it has",
        "give it an attribute num_heads",
    )


def _child(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module | None]:
    return next(
        (
            (name, child)
            for name in names
            if isinstance(child := getattr(module, name, None), nn.Module)
        ),
        ("", None),
    )


def _parts(name: str, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None, int]:
    """Weight, bias and the weight's output dimension of a projection.

    Raises:
        NotApplicable: if it is no plain linear map, or not trained.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if is_adapter(module) or hasattr(module, "lora_A"):
        gain = row_gain(module)
        if gain is not None:
            return gain, None, 0
        raise NotApplicable(
            f"{name} is an adapter around a frozen weight, and clipping that would be lost when "
            "only adapters are saved",
            "lower the learning rate of the adapters",
        )
    if (
        parametrize.is_parametrized(module)
        or not isinstance(weight, nn.Parameter)
        or weight.ndim != 2
    ):
        raise NotApplicable(f"{name} ({type(module).__name__}) is no plain matrix of weights")
    if not weight.is_floating_point() or not weight.requires_grad:
        kind = "quantised" if not weight.is_floating_point() else "frozen"
        raise NotApplicable(
            f"{name} is {kind}: it is not what grew",
            "lower the learning rate of what is trained around it",
        )
    return (
        weight,
        bias if isinstance(bias, nn.Parameter) else None,
        1 if type(module).__name__ == "Conv1D" else 0,
    )


def _slices(name: str, module: nn.Module, starts: Sequence[int], width: int) -> list[list[Rows]]:
    weight, bias, dim = _parts(name, module)
    return [
        [
            Rows(weight, dim, at, at + width),
            *([] if bias is None else [Rows(bias, 0, at, at + width)]),
        ]
        for at in starts
    ]


def _separate(
    name: str, query: nn.Module, key: nn.Module | None, heads: int, width: int | None
) -> QueryKey:
    weight, _, dim = _parts(name, query)
    out = weight.shape[dim]
    width = width or out // heads
    if out != heads * width:
        raise NotApplicable(f"{name} makes {out} features, which are not {heads} heads of {width}")
    sliced = _slices(name, query, range(0, out, width), width)
    features = None if key is None else _out(key)
    if key is None or features is None or features % width:
        return QueryKey(f"{name} alone", sliced)
    own = features == out
    keys = _slices("key projection", key, range(0, features, width), width)
    if own:
        return QueryKey(f"{name} and its key projection", sliced, keys)
    return QueryKey(
        f"{name} alone (keys serve several heads)",
        sliced,
        others=[each for head in keys for each in head],
    )


def _out(module: nn.Module) -> int | None:
    """Features that a key projection makes; None where it cannot be scaled, which the queries alone
    can do as well.
    """
    try:
        weight, _, dim = _parts("key projection", module)
    except NotApplicable:
        return None
    return weight.shape[dim]


def _fused(name: str, module: nn.Module, heads: int, width: int | None) -> list[QueryKey]:
    """Both orders that a fused projection is met in, where its size allows them: q, k, v one after
    the other, or group by group.
    """
    weight, _, dim = _parts(name, module)
    orders, width, own = _orders(name, weight.shape[dim], heads, width)
    found = []
    for order, (queries, keys) in orders.items():
        query, key = (_slices(name, module, starts, width) for starts in (queries, keys))
        others = [] if own else [each for head in key for each in head]
        found.append(QueryKey(f"{name}, {order}", query, key if own else None, others=others))
    return found


def _orders(
    name: str, out: int, heads: int, width: int | None
) -> tuple[dict[str, tuple[list[int], list[int]]], int, bool]:
    """Where each head's queries and keys may begin, the likeliest order first; D; and whether each
    query head has its own key head.
    """
    width = width or out // (3 * heads)
    key_heads = (out // width - heads) // 2 if width else 0
    if key_heads < 1 or (heads + 2 * key_heads) * width != out or heads % key_heads:
        raise NotApplicable(
            f"{name} makes {out} features, which are not {heads} heads of {width} with keys and "
            "values",
            SEPARATE,
        )
    group = heads // key_heads
    one_after_the_other = (
        [at * width for at in range(heads)],
        [(heads + at) * width for at in range(key_heads)],
    )
    by_group = (
        [(h // group * (group + 2) + h % group) * width for h in range(heads)],
        [(at * (group + 2) + group) * width for at in range(key_heads)],
    )
    orders = {"q, k, v in turn": one_after_the_other, "group by group": by_group}
    if name in INTERLEAVED_PROJECTIONS:
        orders = dict(reversed(orders.items()))
    if by_group == one_after_the_other:
        orders = dict(list(orders.items())[:1])
    return orders, width, key_heads == heads


def _torch_multihead(module: nn.MultiheadAttention) -> QueryKey:
    heads, width = module.num_heads, module.head_dim
    starts = range(0, heads * width, width)
    if module.in_proj_weight is not None:
        query_weight, key_weight, shift = (
            module.in_proj_weight,
            module.in_proj_weight,
            heads * width,
        )
    else:
        query_weight, key_weight, shift = module.q_proj_weight, module.k_proj_weight, 0
    if not (query_weight.requires_grad and key_weight.requires_grad):
        raise NotApplicable("in_proj is frozen: it is not what grew")
    query = [[Rows(query_weight, 0, at, at + width)] for at in starts]
    key = [[Rows(key_weight, 0, shift + at, shift + at + width)] for at in starts]
    bias = module.in_proj_bias
    if isinstance(bias, nn.Parameter):
        for head, at in enumerate(starts):
            query[head].append(Rows(bias, 0, at, at + width))
            key[head].append(Rows(bias, 0, heads * width + at, heads * width + at + width))
    if module.bias_k is not None:  # an extra key that no projection makes
        return QueryKey(
            "in_proj, queries alone", query, others=[each for head in key for each in head]
        )
    return QueryKey("in_proj", query, key)


def _width(found: QueryKey) -> int:
    return found.query[0][0].stop - found.query[0][0].start
