"""Hand-written attention: a softmax over what a product of queries and keys became.

The product is followed from operation to operation until it reaches a softmax. Between the two a model scales, caps,
masks, casts and reshapes; scale and cap are followed, and what the scores then differ by is the mask. So query and key
come out together with a mask for which the scores are exactly those of the model. Where that fails, the scores themselves
are handed over: the model has formed them anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from stabmon.capture.base import bind, head_count, kernel_dtype, nearest_module, with_heads
from stabmon.capture.einsum import einsum_operands
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

FILL = -1e4
"""A constant at or below this, filled in or added, hides a key: its probability is exactly 0 in every format."""


@dataclass(frozen=True, eq=False)
class Product:
    """A tensor that came of ``query @ key.T``, and how."""

    query: Tensor | None
    """``[..., Q, D]``; None where the scores are no function of one query and one key."""
    key: Tensor | None
    """``[..., K, D]``."""
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None
    """What the capped score was multiplied by since; ``scale`` is the factor inside the tanh."""
    masked: bool = False
    """Whether something was added or filled in."""
    fills: tuple[float, ...] = ()
    shift: Tensor | None = None
    """What was taken off every score of a row, ``[..., Q, 1]``: the softmax does not see it, the largest score does."""

    def opaque(self) -> Product:
        """The same where only the scores can be told from now on."""
        return replace(self, query=None, key=None)


class Products:
    """Which of a forward's living tensors came of a product of queries and keys."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def get(self, tensor: object) -> Product | None:
        """What is known of ``tensor``."""
        product: Product | None = self._known.get(tensor) if isinstance(tensor, Tensor) else None
        return product

    def follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Learn from one operation that the model has made."""
        if name == "__setitem__":
            result = args[0]
        if not isinstance(result, Tensor) or result.ndim < 3 or not result.is_floating_point():
            return
        product = multiply(name, args, kwargs) or self._next(name, args, kwargs, result)
        if product is not None:
            self._known[result] = product

    def _next(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> Product | None:
        if not len(self._known):
            return None
        operands = (*args, *kwargs.values())
        parents = [(operand, product) for operand in operands if (product := self.get(operand)) is not None]
        if not parents or parents[0][0].shape[-2:] != result.shape[-2:] or parents[0][0].numel() != result.numel():
            return None
        tensor, product = parents[0]
        if len({id(p) for _, p in parents}) > 1:
            return product.opaque()
        others = [operand for operand in operands if operand is not tensor]
        return step(name.strip("_"), product, others)


def multiply(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """The product of queries and keys that an operation forms, if it does."""
    if name == "einsum":
        operands = einsum_operands(args)
        if operands is None:
            return None
        left, right = operands
        return Product(left, right, kernel_dtype(args[1]))
    if name in ("matmul", "__matmul__", "bmm"):
        left, right, factor, masked = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values())), 1.0, False
    elif name == "baddbmm":
        given = bind(("input", "batch1", "batch2"), args, kwargs)
        left, right, factor, masked = given["batch1"], given["batch2"], given.get("alpha", 1.0), given.get("beta", 1) != 0
    else:
        return None
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.ndim < 3 or right.ndim < 3:
        return None
    return Product(left, right.transpose(-1, -2), kernel_dtype(left), scale=float(factor), masked=masked)


KEEPS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"} | {
    *("view", "view_as", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze")
}
ADDS = {"add", "radd", "iadd", "sub", "isub", "where", "masked_fill", "setitem", "nan_to_num"} | {
    *("clamp", "clamp_min", "max", "maximum")
}
SCALES = {"mul": 1, "rmul": 1, "imul": 1, "multiply": 1, "div": -1, "truediv": -1, "itruediv": -1, "true_divide": -1}


def step(name: str, product: Product, others: list[Any]) -> Product:
    """What a product becomes by one operation, named without underscores, with its ``others`` operands."""
    if name in KEEPS:
        return product
    if name in ("sub", "isub") and product.shift is None and len(others) == 1 and is_column(others[0]):
        return replace(product, shift=others[0])
    if name in ADDS:
        fills = tuple(float(other) for other in others if is_number(other) and float(other) <= FILL)
        return replace(product, masked=True, fills=product.fills + fills)
    if name in SCALES and len(others) == 1 and is_number(others[0]) and product.shift is None:
        factor = float(others[0]) ** SCALES[name]
        if product.cap is None:
            return replace(product, scale=product.scale * factor)
        return replace(product, cap=product.cap * factor)
    if name in ("mul", "rmul", "imul") and len(others) == 1 and is_column(others[0]) and can_take(product, others[0]):
        return replace(product, query=product.query * others[0].detach())
    if name == "tanh" and product.cap is None and not product.masked:
        return replace(product, cap=1.0)
    return product.opaque()


def can_take(product: Product, gain: Tensor) -> bool:
    """Whether a gain a head or a query, ``[..., H, Q or 1, 1]``, can be multiplied into the query instead of the scores."""
    return product.cap is None and not product.masked and product.query is not None and gain.ndim <= product.query.ndim


def is_column(value: object) -> bool:
    """Whether ``value`` is one number a row."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[-1] == 1


def is_number(value: object) -> bool:
    """Whether ``value`` is one real number, as such or in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)


def handle_softmax(
    capture: AttentionCapture,
    products: Products,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Record a softmax if it is attention, then take it."""
    given = bind(("input", "dim"), args, kwargs)
    logits, axis = given["input"], given.get("dim")
    if isinstance(logits, Tensor) and logits.ndim >= 3 and isinstance(axis, int):
        product = products.get(logits) if axis in (-1, logits.ndim - 1) else None
        module = nearest_module(capture.names)
        if module is not None and (product is not None or capture.names.matches(module, capture.modules)):
            shown = logits.movedim(axis, -1)
            found = product or Product(None, None, kernel_dtype(logits))
            capture.record("softmax", module, lambda layer: read_softmax(layer, module, shown, found))
    return function(*args, **kwargs)


def read_softmax(layer: str, module: nn.Module, logits: Tensor, product: Product) -> AttentionCall:
    """The call with query and key where they can be told, else with the scores."""
    if product.shift is not None:
        logits = logits + product.shift.to(logits.dtype)
    heads = head_count(module, logits.shape[0]) if logits.ndim == 3 else 1
    scores = with_heads(logits, heads) if logits.ndim < 5 else logits.flatten(1, -3)
    call = AttentionCall(
        layer=layer, query=None, key=None, scale=product.scale, dtype=product.dtype, softcap=None, fused=False, module=module
    )
    if product.query is not None and product.key is not None and logits.ndim < 5:
        full = affine(call, scores, product, product.query, product.key)
        if full is not None:
            return full
    return replace(call, scale=1.0, scores=hide(scores, product.fills))


def affine(call: AttentionCall, scores: Tensor, product: Product, query: Tensor, key: Tensor) -> AttentionCall | None:
    """``call`` with query, key and the mask for which the scores come out as the model's; None where there is none."""
    batch, heads, queries, keys = scores.shape
    scale, cap = product.scale, product.cap
    if cap is not None:
        scale, cap = scale * cap, cap
    try:
        query = arrange(query, batch, heads, queries).to(product.dtype)
        key = arrange(key, batch, heads, keys).to(product.dtype)
    except RuntimeError:  # shapes that are no queries and keys of these scores
        return None
    wide = torch.promote_types(torch.float32, scores.dtype)
    plain = scale * (query.to(wide) @ key.to(wide).transpose(-1, -2))
    if cap is not None:
        plain = cap * torch.tanh(plain / cap)
    rest = scores.to(wide) - plain
    hidden = is_hidden(scores, product.fills) | (rest <= 0.9 * FILL) if product.masked else is_hidden(scores)
    coarsest = max(torch.finfo(product.dtype).eps, torch.finfo(scores.dtype).eps)
    size = plain.abs().amax()
    exact = bool((rest.masked_fill(hidden, 0).abs().amax() <= 32 * coarsest * size).item()) if rest.numel() else True
    if not exact and not product.masked:
        return None
    call = replace(call, query=query, key=key, scale=scale, softcap=cap)
    if not exact:
        return replace(call, mask=rest.masked_fill(hidden, -torch.inf))
    visible = ~hidden
    lower = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if bool((visible == lower).all().item()):
        return replace(call, is_causal=True) if not bool(lower.all().item()) else call
    return call if bool(visible.all().item()) else replace(call, mask=visible)


def arrange(tensor: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """An operand of the product as ``[B, H or 1, L, D]``."""
    if tensor.ndim == 3 and len(tensor) == batch * heads:
        return tensor.reshape(batch, heads, length, tensor.shape[-1])
    tensor = with_heads(tensor)
    return tensor.expand(batch, heads if tensor.shape[1] != 1 else 1, length, -1)


def is_hidden(scores: Tensor, fills: tuple[float, ...] = ()) -> Tensor:
    """Where a key is hidden: at -inf, beyond half of the lowest number, or at one of the constants filled in."""
    hidden = scores <= torch.finfo(scores.dtype).min / 2
    for fill in fills:
        hidden = hidden | (scores == torch.tensor(fill, dtype=scores.dtype, device=scores.device))
    return hidden


def hide(scores: Tensor, fills: tuple[float, ...] = ()) -> Tensor:
    """Scores with the hidden keys at -inf."""
    return scores.masked_fill(is_hidden(scores, fills), -torch.inf)
