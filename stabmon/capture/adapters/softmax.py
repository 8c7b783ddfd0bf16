"""Hand-written attention: a softmax of queries times keys, used as weights.

The product is followed from operation to operation until it reaches a softmax, and the softmax to
the place where something is summed with its result: only then is it attention. Between product and
softmax a model scales, caps, masks, casts, joins and reshapes; scale and cap are followed, and the
rest of the difference is the mask. So query and key are recorded with a mask for which the scores
are exactly those of the model. Where that fails, the scores themselves are recorded: the model has
formed them anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture.callers import nearest_module
from stabmon.capture.function_mode import kernel_dtype
from stabmon.capture.layout import layout
from stabmon.capture.masks.recover import conceal, is_hidden, recover_mask
from stabmon.capture.protocol import CaptureSession, bind
from stabmon.capture.provenance.axes import Axes
from stabmon.capture.provenance.exponentials import Made, exp_range
from stabmon.capture.provenance.products import ScoreProvenance
from stabmon.capture.provenance.tracker import Provenance
from stabmon.capture.provenance.weights import Softmax, Weights
from stabmon.records import AttentionCall


def watch_softmax(
    session: CaptureSession,
    provenance: Provenance,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Take a softmax, and record it now or later.

    It is recorded at once where its module was named, else when its weights are used.
    """
    given, found = bind(("input", "dim"), args, kwargs), None
    with session.guarded():
        found = product_under(session, provenance, given)
    if found is None:
        return call(*args, **kwargs)
    logits, axis, product = found
    if isinstance(kwargs.get("out"), Tensor):
        logits = logits.detach().clone()
    result = call(*args, **kwargs)
    with session.guarded():
        provenance.soften(Made(logits, product, axis), result)
        weights = provenance.get(result)
        if session.at_once and isinstance(weights, Weights):
            record_softmax(session, weights.softmaxes[0], weights)
    return result


def product_under(
    session: CaptureSession, provenance: Provenance, given: Mapping[str, Any]
) -> tuple[Tensor, int, ScoreProvenance] | None:
    """Return scores, axis and product of a softmax that may be attention.

    None where it is none, or where it has been recorded in here, by the name of its module.
    """
    logits, axis = given.get("input"), given.get("dim")
    if not isinstance(logits, Tensor) or not isinstance(axis, int):
        return None
    axis %= max(1, logits.ndim)
    product = provenance.get(logits)
    known = isinstance(product, ScoreProvenance) and axis in product.axes.all
    if session.modules and logits.ndim > 2:
        module = nearest_module(session.names)
        if module is not None and session.names.matches(module, session.modules):
            row = logits.ndim - 2 if axis == logits.ndim - 1 else logits.ndim - 1
            unknown = ScoreProvenance(
                None, None, kernel_dtype(logits), Axes(frozenset({row}), frozenset({axis}))
            )
            record_softmax(
                session, Softmax(logits, product if known else unknown, axis, module), None
            )
            return None
    return (logits, axis, product) if known else None


def record_softmax(session: CaptureSession, softmax: Softmax, weights: Weights | None) -> None:
    """Record a softmax, once."""
    axis, module = softmax.axis, softmax.module
    taken = softmax.take()
    if taken is not None:
        logits, product = taken
        sink = sink_of(product, logits, axis, weights)
        session.record(
            "softmax",
            module,
            lambda layer: read_softmax(layer, module, logits, product, axis, sink),
        )


def sink_of(
    product: ScoreProvenance, logits: Tensor, axis: int, weights: Weights | None
) -> int | None:
    """Return the column that is a sink, None for none.

    A sink is joined to the scores as a column of its own, and its weight is left out again.
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
    """Read a softmax as query, key and mask where these are recovered, else as scores.

    Args:
        layer: name of the call.
        module: the module that attends.
        logits: scores as they go into the softmax, dimensions in the model's own order.
        product: what is known of how they came about.
        axis: the dimension of ``logits`` along which the softmax runs.
        sink: the column of ``logits`` that is a sink, if there is one.
    """
    ranges = None if product.explicit is None else exp_range(product.explicit)
    if product.shift is not None and product.shift.ndim <= logits.ndim:
        logits = logits + product.shift.to(logits.dtype)
    if axis not in product.axes.columns:
        product = replace(product, query=product.key, key=product.query)
        others = product.axes.columns
    elif axis in product.axes.rows:
        others = product.axes.all
    else:
        others = product.axes.rows
    rows = sorted(others - {axis})
    leading = [d for d in range(logits.ndim) if d not in (*rows, axis)]
    order = (*leading, *rows, axis)
    shown = logits.permute(order)
    shown = shown.reshape(*(logits.shape[d] for d in leading), -1, logits.shape[axis])
    cells = None
    # where what the model did cannot be done to a mask, only values show what is hidden
    with suppress(RuntimeError, IndexError, TypeError):
        cells = product.cells()
    if cells is not None:
        cells = cells.expand(logits.shape).permute(order).reshape(shown.shape)
    grouped = (
        product.key is not None
        and shown.ndim == 5
        and product.key.shape[-3] == 1 != shown.shape[-3]
    )
    operand = product.key if product.query is None else product.query
    lay_out = layout(shown.shape, module, grouped=grouped, operand=operand)
    scores, cells = lay_out(shown), None if cells is None else lay_out(cells)
    call = AttentionCall(
        layer, None, None, scale=product.scale, dtype=product.dtype, fused=False, module=module
    )
    if ranges is not None and product.explicit is not None:
        ranges = ranges.permute(order).reshape(*shown.shape[:-1], 1)
        call = replace(call, exp_range=lay_out(ranges)[..., 0], exp_dtype=product.explicit.dtype)
    if sink is not None:
        call = replace(call, sinks=sinks_of(scores[..., sink]))
        scores, cells = without(scores, sink), None if cells is None else without(cells, sink)
    if product.query is not None and product.key is not None and fits(product, scores):
        try:
            query = lay_out(broadcast_operand(product.query, shown.shape[:-2]))
            key = (
                product.key[..., 0, :, :]
                if grouped
                else lay_out(broadcast_operand(product.key, shown.shape[:-2]))
            )
        except RuntimeError:  # no queries and keys of these scores
            return of_scores(call, scores, product, cells)
        full = recovered(
            call, scores, product, query.to(product.dtype), key.to(product.dtype), cells
        )
        if full is not None:
            return full
    return of_scores(call, scores, product, cells)


def recovered(
    call: AttentionCall,
    scores: Tensor,
    product: ScoreProvenance,
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
) -> AttentionCall | None:
    """Return the call with query, key and mask, None where no mask fits the scores.

    Hidden keys are found by their values, or else by ``cells``, the scores that the model masked.
    """

    def is_additive(full: AttentionCall) -> bool:
        return full.mask is not None and full.mask.is_floating_point()

    full = recover_mask(call, scores, product, query, key)
    if cells is not None and (full is None or is_additive(full)):
        full = recover_mask(call, conceal(scores, cells), product, query, key)
    return None if full is None or (product.gated and is_additive(full)) else full


def fits(product: ScoreProvenance, scores: Tensor) -> bool:
    """Return whether scores ``[..., Q, K]`` have a row per query and a column per key."""
    assert product.query is not None
    assert product.key is not None
    return (product.query.shape[-2], product.key.shape[-2]) == tuple(scores.shape[-2:])


def of_scores(
    call: AttentionCall, scores: Tensor, product: ScoreProvenance, cells: Tensor | None
) -> AttentionCall:
    """Return the call by its scores alone ``[B, H, Q, K]``, hidden keys at -inf."""
    shown = scores.masked_fill(is_hidden(scores, product.fills), -torch.inf)
    return replace(call, scale=1.0, scores=shown if cells is None else conceal(shown, cells))


def sinks_of(logits: Tensor) -> Tensor:
    """Return a sink's logits ``[B, H, Q]``, as ``[H]`` where all rows have the same."""
    logits = logits.float()
    return logits[0, :, 0] if bool((logits == logits[:1, :, :1]).all().item()) else logits


def without(tensor: Tensor, column: int) -> Tensor:
    """Return ``tensor`` without one column, the first or the last."""
    return tensor[..., 1:] if column == 0 else tensor[..., :column]


def broadcast_operand(operand: Tensor, leading: torch.Size) -> Tensor:
    """Return query or key with the scores' leading dimensions; one head stays one."""
    if operand.ndim == 3 and len(leading) > 1 and operand.shape[0] == leading.numel():
        return operand.reshape(*leading, *operand.shape[-2:])
    if len(leading) == 2 and operand.ndim == 4 and operand.shape[1] == 1:
        return operand.expand(leading[0], 1, -1, -1)
    return operand.expand(*leading, -1, -1)
