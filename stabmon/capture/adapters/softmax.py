"""Hand-written attention: a softmax over what a product of queries and keys became, used as
weights.

The product is followed from operation to operation until it reaches a softmax, and the softmax to
where something is summed with its result: only then is it attention. Between product and softmax a
model scales, caps, masks, casts, joins and reshapes; scale and cap are followed, and what the
scores then differ by is the mask. So query and key come out together with a mask for which the
scores are exactly those of the model. Where that fails, the scores themselves are handed over: the
model has formed them anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stabmon.capture.masks.masking import conceal
from stabmon.capture.masks.recover import explain, hide
from stabmon.capture.protocol import bind, kernel_dtype, layout, nearest_module
from stabmon.capture.provenance.axes import Axes
from stabmon.capture.provenance.manual_softmax import Made
from stabmon.capture.provenance.mode import Provenance
from stabmon.capture.provenance.products import ScoreProvenance
from stabmon.capture.provenance.weights import Softmax, Weights
from stabmon.records import AttentionCall

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture


def handle_softmax(
    capture: AttentionCapture,
    provenance: Provenance,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Take a softmax, and record it: at once where its module was named, else when its weights are
    used.
    """
    given, found = bind(("input", "dim"), args, kwargs), None
    with capture.guarded():
        found = product_under(capture, provenance, given)
    if found is None:
        return function(*args, **kwargs)
    logits, axis, product = found
    if isinstance(kwargs.get("out"), Tensor):
        logits = logits.detach().clone()
    result = function(*args, **kwargs)
    with capture.guarded():
        provenance.soften(Made(logits, product, axis), result)
        weights = provenance.get(result)
        if capture.at_once and isinstance(weights, Weights):
            record_softmax(capture, weights.softmaxes[0], weights)
    return result


def product_under(
    capture: AttentionCapture, provenance: Provenance, given: Mapping[str, Any]
) -> tuple[Tensor, int, ScoreProvenance] | None:
    """The scores, the axis and the product of a softmax that may be attention, and is not recorded
    yet.
    """
    logits, axis = given.get("input"), given.get("dim")
    if not isinstance(logits, Tensor) or not isinstance(axis, int):
        return None
    axis %= max(1, logits.ndim)
    product = provenance.get(logits)
    known = isinstance(product, ScoreProvenance) and axis in product.axes.all
    if capture.modules and logits.ndim > 2:
        module = nearest_module(capture.names)
        if module is not None and capture.names.matches(module, capture.modules):
            row = logits.ndim - 2 if axis == logits.ndim - 1 else logits.ndim - 1
            unknown = ScoreProvenance(
                None, None, kernel_dtype(logits), Axes(frozenset({row}), frozenset({axis}))
            )
            record_softmax(
                capture, Softmax(logits, product if known else unknown, axis, module), None
            )
            return None
    return (logits, axis, product) if known else None


def record_softmax(capture: AttentionCapture, softmax: Softmax, weights: Weights | None) -> None:
    """Record a softmax, once."""
    axis, module = softmax.axis, softmax.module
    taken = softmax.take()
    if taken is not None:
        logits, product = taken
        sink = sink_of(product, logits, axis, weights)
        capture.record(
            "softmax",
            module,
            lambda layer: read_softmax(layer, module, logits, product, axis, sink),
        )


def sink_of(
    product: ScoreProvenance, logits: Tensor, axis: int, weights: Weights | None
) -> int | None:
    """Which column is a sink: one that was joined to the scores alone, and whose weight was left
    out again.
    """
    keys = logits.shape[axis]
    if weights is None or weights.kept is None or sum(product.pieces) != keys:
        return None
    for column, piece, kept in (
        (0, product.pieces[0], (1, keys)),
        (keys - 1, product.pieces[-1], (0, keys - 1)),
    ):
        if piece == 1 and weights.kept == kept:
            return column
    return None


def read_softmax(
    layer: str,
    module: nn.Module,
    logits: Tensor,
    product: ScoreProvenance,
    axis: int,
    sink: int | None = None,
) -> AttentionCall:
    """The call with query and key where they can be told, else with the scores."""
    if product.shift is not None and product.shift.ndim <= logits.ndim:
        logits = logits + product.shift.to(logits.dtype)
    swapped = axis not in product.axes.columns
    product = replace(product, query=product.key, key=product.query) if swapped else product
    rows = sorted(
        (
            product.axes.all
            if axis in product.axes.columns & product.axes.rows
            else opposite(product, axis)
        )
        - {axis}
    )
    leading = [d for d in range(logits.ndim) if d not in (*rows, axis)]
    arranged = logits.permute(*leading, *rows, axis)
    shown = arranged.reshape(*(logits.shape[d] for d in leading), -1, logits.shape[axis])
    cells = None
    with suppress(
        RuntimeError, IndexError, TypeError
    ):  # what the model did cannot be done to a mask: only values tell then
        cells = product.cells()
    if cells is not None:
        cells = cells.expand(logits.shape).permute(*leading, *rows, axis).reshape(shown.shape)
    grouped = (
        product.key is not None
        and shown.ndim == 5
        and product.key.shape[-3] == 1 != shown.shape[-3]
    )
    lay_out = layout(
        shown.shape,
        module,
        grouped=grouped,
        operand=product.key if product.query is None else product.query,
    )
    scores, cells = lay_out(shown), None if cells is None else lay_out(cells)
    call = AttentionCall(
        layer, None, None, scale=product.scale, dtype=product.dtype, fused=False, module=module
    )
    if sink is not None:
        call = replace(call, sinks=sinks_of(scores[..., sink]))
        scores, cells = without(scores, sink), None if cells is None else without(cells, sink)
    if product.query is not None and product.key is not None and fits(product, scores):
        try:
            query = lay_out(spread(product.query, shown.shape[:-2]))
            key = (
                product.key[..., 0, :, :]
                if grouped
                else lay_out(spread(product.key, shown.shape[:-2]))
            )
        except RuntimeError:  # no queries and keys of these scores
            return of_scores(call, scores, product, cells)
        full = explained(
            call, scores, product, query.to(product.dtype), key.to(product.dtype), cells
        )
        if full is not None:
            return full
    return of_scores(call, scores, product, cells)


def explained(
    call: AttentionCall,
    scores: Tensor,
    product: ScoreProvenance,
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
) -> AttentionCall | None:
    """The call with query, key and mask, hidden keys told by their values or by what the model did;
    None where that fails.
    """

    def is_additive(full: AttentionCall) -> bool:
        return full.mask is not None and full.mask.is_floating_point()

    full = explain(call, scores, product, query, key)
    if cells is not None and (full is None or is_additive(full)):
        full = explain(call, conceal(scores, cells), product, query, key)
    return None if full is None or (product.gated and is_additive(full)) else full


def opposite(product: ScoreProvenance, axis: int) -> frozenset[int]:
    """The axes of the rows, where ``axis`` is one of the columns', and the other way round."""
    return product.axes.rows if axis in product.axes.columns else product.axes.columns


def fits(product: ScoreProvenance, scores: Tensor) -> bool:
    """Whether query and key are as many as the scores ``[..., Q, K]`` have rows and columns."""
    assert product.query is not None
    assert product.key is not None
    return (product.query.shape[-2], product.key.shape[-2]) == tuple(scores.shape[-2:])


def of_scores(
    call: AttentionCall, scores: Tensor, product: ScoreProvenance, cells: Tensor | None
) -> AttentionCall:
    """The call by its scores alone ``[B, H, Q, K]``, keys that are hidden at -inf."""
    shown = hide(scores, product.fills)
    return replace(call, scale=1.0, scores=shown if cells is None else conceal(shown, cells))


def sinks_of(logits: Tensor) -> Tensor:
    """The logits ``[B, H, Q]`` of a sink; ``[H]`` where they are learned, and the same for every
    row.
    """
    logits = logits.float()
    return logits[0, :, 0] if bool((logits == logits[:1, :, :1]).all().item()) else logits


def without(tensor: Tensor, column: int) -> Tensor:
    """``tensor`` without one column, the first or the last."""
    return tensor[..., 1:] if column == 0 else tensor[..., :column]


def spread(operand: Tensor, leading: torch.Size) -> Tensor:
    """An operand of the product with the leading dimensions that the scores have; one head stays
    one.
    """
    if operand.ndim == 3 and len(leading) > 1 and operand.shape[0] == leading.numel():
        return operand.reshape(*leading, *operand.shape[-2:])
    if len(leading) == 2 and operand.ndim == 4 and operand.shape[1] == 1:
        return operand.expand(leading[0], 1, -1, -1)
    return operand.expand(*leading, -1, -1)
