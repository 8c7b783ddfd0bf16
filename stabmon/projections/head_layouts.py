"""Layouts of heads in projections, proposed by name and size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from stabmon.model_names import INTERLEAVED_PROJECTIONS
from stabmon.projections.adapter_modules import is_adapter, is_transposed, row_gain
from stabmon.projections.head_rows import QueryKey, Rows
from stabmon.projections.not_applicable import NotApplicable

SEPARATE = (
    "give the attention module projections named q_proj and k_proj, or one named qkv in "
    "the order q, k, v"
)
"""Advice where queries and keys cannot be told apart."""


def _parts(name: str, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None, int]:
    """Return weight, bias and the weight's output dimension of a projection.

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
    parametrized = parametrize.is_parametrized(module)
    if parametrized or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise NotApplicable(f"{name} ({type(module).__name__}) is no plain matrix of weights")
    if not weight.is_floating_point() or not weight.requires_grad:
        kind = "quantised" if not weight.is_floating_point() else "frozen"
        raise NotApplicable(
            f"{name} is {kind}: it is not what grew",
            "lower the learning rate of what is trained around it",
        )
    return weight, bias if isinstance(bias, nn.Parameter) else None, int(is_transposed(module))


def _slices(name: str, module: nn.Module, starts: Sequence[int], width: int) -> list[list[Rows]]:
    """Return the rows of weight and bias of each head."""
    weight, bias, dim = _parts(name, module)
    return [
        [
            Rows(weight, dim, at, at + width),
            *([] if bias is None else [Rows(bias, 0, at, at + width)]),
        ]
        for at in starts
    ]


def separate_layout(
    name: str, query: nn.Module, key: nn.Module | None, heads: int, width: int | None
) -> QueryKey:
    """Return the proposal for separate projections of queries and keys.

    Args:
        name: name of the query projection, for messages.
        query: the query projection.
        key: the key projection; None where it is not known.
        heads: query heads.
        width: head dimension; None if it is not known.

    Raises:
        NotApplicable: if the features are not ``heads`` heads, or the projection cannot be scaled.
    """
    weight, _, dim = _parts(name, query)
    out = weight.shape[dim]
    width = width or out // heads
    if out != heads * width:
        raise NotApplicable(f"{name} makes {out} features, which are not {heads} heads of {width}")
    sliced = _slices(name, query, range(0, out, width), width)
    features = None if key is None else _out(key)
    if key is None or features is None or features % width:
        return QueryKey(f"{name} alone", sliced)
    keys = _slices("key projection", key, range(0, features, width), width)
    if features == out:
        return QueryKey(f"{name} and its key projection", sliced, keys)
    others = [each for head in keys for each in head]
    return QueryKey(f"{name} alone (keys serve several heads)", sliced, others=others)


def _out(module: nn.Module) -> int | None:
    """Return the features that a key projection makes; None where it cannot be scaled.

    The queries alone can be scaled as well.
    """
    try:
        weight, _, dim = _parts("key projection", module)
    except NotApplicable:
        return None
    return weight.shape[dim]


def fused_layouts(name: str, module: nn.Module, heads: int, width: int | None) -> list[QueryKey]:
    """Return the proposals for a projection of queries, keys and values together.

    Both orders in use, where its size allows them: q, k, v one after the other, or group by group;
    the likeliest first.

    Args:
        name: name of the projection.
        module: the projection.
        heads: query heads.
        width: head dimension; None if it is not known.

    Raises:
        NotApplicable: if the features are not so many heads, or the projection cannot be scaled.
    """
    weight, _, dim = _parts(name, module)
    orders, width, own = fused_orders(name, weight.shape[dim], heads, width)
    found = []
    for order, (queries, keys) in orders.items():
        query, key = (_slices(name, module, starts, width) for starts in (queries, keys))
        others = [] if own else [each for head in key for each in head]
        found.append(QueryKey(f"{name}, {order}", query, key if own else None, others=others))
    return found


def fused_orders(
    name: str, out: int, heads: int, width: int | None
) -> tuple[dict[str, tuple[list[int], list[int]]], int, bool]:
    """Return the features at which each head's queries and keys may begin.

    Args:
        name: name of the projection.
        out: its output features.
        heads: query heads.
        width: head dimension; None if it is not known.

    Returns:
        (queries, keys) by order, the likeliest first; the head dimension; and whether each query
        head has its own key head.

    Raises:
        NotApplicable: if the features are not so many heads.
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


def multihead_layout(module: nn.MultiheadAttention) -> QueryKey:
    """Return the proposal for torch's own multi-head attention.

    Raises:
        NotApplicable: if its projections are frozen.
    """
    heads, width = module.num_heads, module.head_dim
    starts = range(0, heads * width, width)
    query_weight, key_weight, shift = module.q_proj_weight, module.k_proj_weight, 0
    if module.in_proj_weight is not None:
        query_weight = key_weight = module.in_proj_weight
        shift = heads * width
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
        others = [each for head in key for each in head]
        return QueryKey("in_proj, queries alone", query, others=others)
    return QueryKey("in_proj", query, key)
