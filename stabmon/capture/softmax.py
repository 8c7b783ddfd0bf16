"""Hand-written attention: a softmax over what a product of queries and keys became.

The product is followed from operation to operation until it reaches a softmax. Between the two a model scales, caps,
masks, casts and reshapes; scale and cap are followed, and what the scores then differ by is the mask. So query and key
come out together with a mask for which the scores are exactly those of the model. Where that fails, the scores themselves
are handed over: the model has formed them anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stabmon.capture.base import bind, head_count, kernel_dtype, nearest_module, with_heads
from stabmon.capture.products import FILL, Product, Products
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture


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
    size = plain.abs()
    rounding = 4 * coarsest * size + 32 * torch.finfo(torch.float32).eps * (size.amax() if size.numel() else 0)
    exact = bool(((rest.abs() <= rounding) | hidden).all().item())
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
