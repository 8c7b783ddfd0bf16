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

from stabmon.capture.base import bind, kernel_dtype, layout, nearest_module
from stabmon.capture.explain import explain, hide
from stabmon.capture.products import Product, Products
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
    with capture.guarded():
        look_at_softmax(capture, products, bind(("input", "dim"), args, kwargs))
    return function(*args, **kwargs)


def look_at_softmax(capture: AttentionCapture, products: Products, given: Mapping[str, Any]) -> None:
    """Record a softmax if it is taken over the keys of a product, or in a module that was named."""
    logits, axis = given.get("input"), given.get("dim")
    if not isinstance(logits, Tensor) or logits.ndim < 3 or not isinstance(axis, int):
        return
    product = products.get(logits) if axis in (-1, logits.ndim - 1) else None
    module = nearest_module(capture.names)
    if module is not None and (product is not None or capture.names.matches(module, capture.modules)):
        shown = logits.movedim(axis, -1)
        found = product or Product(None, None, kernel_dtype(logits))
        capture.record("softmax", module, lambda layer: read_softmax(layer, module, shown, found))


def read_softmax(layer: str, module: nn.Module, logits: Tensor, product: Product) -> AttentionCall:
    """The call with query and key where they can be told, else with the scores."""
    if product.shift is not None:
        logits = logits + product.shift.to(logits.dtype)
    grouped = product.key is not None and logits.ndim == 5 and product.key.shape[-3] == 1 != logits.shape[-3]
    lay_out = layout(logits.shape, module, grouped=grouped)
    scores = lay_out(logits)
    call = AttentionCall(layer, None, None, scale=product.scale, dtype=product.dtype, fused=False, module=module)
    if product.query is not None and product.key is not None:
        leading = logits.shape[:-2]
        try:
            query = lay_out(spread(product.query, leading))
            key = product.key[..., 0, :, :] if grouped else lay_out(spread(product.key, leading))
        except RuntimeError:  # no queries and keys of these scores
            return replace(call, scale=1.0, scores=hide(scores, product.fills))
        full = explain(call, scores, product, query.to(product.dtype), key.to(product.dtype))
        if full is not None:
            return full
    return replace(call, scale=1.0, scores=hide(scores, product.fills))


def spread(operand: Tensor, leading: torch.Size) -> Tensor:
    """An operand of the product with the leading dimensions that the scores have; one head stays one."""
    if operand.ndim == 3 and len(leading) > 1 and operand.shape[0] == leading.numel():
        return operand.reshape(*leading, *operand.shape[-2:])
    if len(leading) == 2 and operand.ndim == 4 and operand.shape[1] == 1:
        return operand.expand(leading[0], 1, -1, -1)
    return operand.expand(*leading, -1, -1)
