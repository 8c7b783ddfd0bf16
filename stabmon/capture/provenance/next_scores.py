"""Scores after one operation: moved, joined, or multiplied with another tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.function_mode import modes_off
from stabmon.capture.provenance.axes import RESIZES, VIEWS, Carried
from stabmon.capture.provenance.cells import Cells, either, joined, no_cells, padded, replayed
from stabmon.capture.provenance.multiply import sums
from stabmon.capture.provenance.operations import Operation
from stabmon.capture.provenance.products import ScoreProvenance, moved, product_of, step
from stabmon.capture.provenance.weights import Weights

Tracked = list[tuple[int, Tensor, Any]]
"""Operands of known origin: place among all operands, tensor, record."""


def scores_moved(
    operation: Operation, tracked: Tracked, carried: Carried, part: int | None
) -> ScoreProvenance | None:
    """Follow scores through a view, arithmetic, or a choice of their elements.

    Args:
        operation: the operation that was made.
        tracked: its operands of known origin; the first is scores.
        carried: their axes after it.
        part: which of several results; None where there is one.
    """
    position, tensor = tracked[0][:2]
    product: ScoreProvenance = tracked[0][2]
    name, args, kwargs = operation.name, operation.args, operation.kwargs
    if len({id(record) for _, _, record in tracked}) > 1:
        together: Cells = no_cells
        for _, _, record in tracked:
            if not isinstance(record, ScoreProvenance) or record.shift is not None:
                return None
            together = either(together, record.cells)
        return replace(product.opaque(), axes=carried.axes, cells=together, masked=True)
    if name not in VIEWS | RESIZES:
        after = step(name, product, operation.others(tensor), position)
        return None if after is None else replace(after, axes=carried.axes)
    if product.shift is not None:
        if name not in VIEWS or part is not None:
            return None
        with modes_off(), torch.no_grad():
            wide = product.shift.detach().expand(tensor.shape)
            product = replace(product, shift=operation.function(wide, *args[1:], **kwargs))
    if name == "pad":
        padding = moved(name, product, carried, padded(args, kwargs, tensor, product.cells))
        return replace(padding, pieces=pieces_of_padding(operation, tensor, carried))
    cells = replayed(operation.function, args, kwargs, tensor, product.cells, part)
    return moved(name, product, carried, cells)


def pieces_of_padding(operation: Operation, tensor: Tensor, carried: Carried) -> tuple[int, ...]:
    """Return the pieces of scores padded by one column, as softmax-off-by-one does."""
    if carried.axes.columns != {tensor.ndim - 1}:
        return ()
    given = tuple(operation.kwargs.get("pad", operation.args[1] if len(operation.args) > 1 else ()))
    keys = tensor.shape[-1]
    return {(1, 0): (1, keys), (0, 1): (keys, 1)}.get(given, ())


def scores_joined(
    operation: Operation,
    tensor: Tensor,
    product: ScoreProvenance,
    carried: Carried | None,
    get: Callable[[object], Any],
) -> ScoreProvenance | None:
    """Follow scores through a join with other scores or tensors.

    Args:
        operation: the join.
        tensor: the first of its operands that is scores.
        product: what is known of it.
        carried: its axes after the join; None where they are lost.
        get: returns what is known of a tensor.
    """
    args, kwargs = operation.args, operation.kwargs
    given = args[0] if args else kwargs["tensors"]
    # torch.cat leaves out empty vectors, with which some caches begin
    tensors = [each for each in given if each.shape != (0,)]
    records = [get(each) for each in tensors]
    if carried is None or not all(
        r is None or (isinstance(r, ScoreProvenance) and r.shift is None) for r in records
    ):
        return None
    pieces = [
        (t.shape, t.device, None if r is None else r.cells)
        for t, r in zip(tensors, records, strict=True)
    ]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % max(1, tensor.ndim)
    along_keys = operation.name != "stack" and carried.axes.columns == {dim}
    widths = tuple(t.shape[dim] for t in tensors) if along_keys else ()
    fills = tuple(fill for r in records if r is not None for fill in r.fills)
    # where all others are a column each, as a sink is, query and key stay known
    wide = [r for r, width in zip(records, widths, strict=False) if width > 1]
    alone = len(wide) == 1 and isinstance(wide[0], ScoreProvenance)
    first = wide[0] if alone else product.opaque()
    cells = joined(operation.function, pieces, args, kwargs)
    return replace(first, axes=carried.axes, cells=cells, masked=True, fills=fills, pieces=widths)


def multiplied(
    operation: Operation, tracked: Tracked, result: Tensor
) -> ScoreProvenance | Weights | None:
    """Follow scores or weights into a product, which may mix their heads.

    Everything else that a product makes of them is new scores, or nothing known.

    Args:
        operation: the product.
        tracked: its operands of known origin.
        result: its result.
    """
    name, args, kwargs = operation.name, operation.args, operation.kwargs
    for _, tensor, record in tracked:
        if not isinstance(record, ScoreProvenance | Weights):
            continue
        for each in sums(name, args, kwargs, tensor):
            if not each.over & record.axes.all and record.axes.all <= each.places.keys():
                axes = record.axes.at(each.places.__getitem__)
                if isinstance(record, Weights):
                    return replace(record, axes=axes, kept=None)
                if record.shift is not None:
                    return None
                return replace(record.opaque(), axes=axes, cells=no_cells)
    if any(isinstance(record, Weights) for _, _, record in tracked):
        return None
    return product_of(name, args, kwargs, result)
