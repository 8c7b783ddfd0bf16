"""Where the tensors of a forward come from: products of queries and keys, followed to a softmax and
on to its use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from stabmon.capture.masks.masking import Cells, either, joined, nothing, padded, replayed
from stabmon.capture.provenance.axes import RESIZES, VIEWS, Axes, Carried, carry, modes_off
from stabmon.capture.provenance.buffers import after_set_item, base_after_write, onto
from stabmon.capture.provenance.manual_softmax import (
    Exponential,
    HandMade,
    LogTotal,
    Made,
    Total,
    next_by_hand,
    scores_overwritten,
)
from stabmon.capture.provenance.multiply import PRODUCTS, sums
from stabmon.capture.provenance.operations import Operation
from stabmon.capture.provenance.outer import Outer, outer_of, summed_outer
from stabmon.capture.provenance.products import ScoreProvenance, moved, product_of, step
from stabmon.capture.provenance.weights import (
    READS,
    Attend,
    Softmax,
    Weights,
    dimensions,
    is_use,
    next_weights,
    united,
)

Record = ScoreProvenance | Weights | HandMade | Outer
Tracked = list[tuple[int, Tensor, Any]]
"""Operands of which something is known: place among all of them, tensor, record."""
JOINS = {"cat", "concat", "concatenate", "stack"}


class Provenance:
    """Which of a forward's living tensors came of a product of queries and keys.

    Args:
        attend: receives each softmax when something is summed with its weights.
        owner: gives the module whose code is running; None where it is none of the model's.
    """

    def __init__(self, attend: Attend, owner: Callable[[], nn.Module | None]) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._unused: weakref.WeakSet[Softmax] = weakref.WeakSet()
        self._attend = attend
        self._owner = owner
        self._copy: Tensor | None = None

    def get(self, tensor: object) -> Any:
        """What is known of ``tensor``."""
        return self._known.get(tensor) if isinstance(tensor, Tensor) else None

    def before(self, operation: Operation) -> None:
        """Look at an operation that is about to be made: whether it uses weights, and what it
        overwrites.
        """
        self._copy = None
        if not len(self._known):
            return
        if operation.name in PRODUCTS or operation.name in ("sum", "nansum", "mean"):
            for _, tensor, record in self._tracked(operation):
                if isinstance(record, Weights) and is_use(
                    operation.name, operation.args, operation.kwargs, tensor, record
                ):
                    self._used(record)
        changed = operation.changed
        if changed is not None:
            for softmax in list(self._unused):
                softmax.keep_from(changed)
            self._copy = scores_overwritten(operation, self.get(changed))

    def after(self, operation: Operation, result: Any) -> None:
        """Learn from an operation that the model has made."""
        if operation.name == "setitem":
            target, index, value = operation.args
            self._learn(
                target, after_set_item(target, index, value, self.get(target), self.get(value))
            )
            self._tell_base(operation, target)
            return
        results = list(result) if isinstance(result, list | tuple) else [result]
        if not results or not isinstance(results[0], Tensor) or not results[0].is_floating_point():
            return
        tracked = self._tracked(operation)
        if tracked:
            records = self._next(operation, tracked, results, many=isinstance(result, list | tuple))
        elif operation.name in PRODUCTS:
            records = [product_of(operation.name, operation.args, operation.kwargs, results[0])]
        else:
            records = [outer_of(operation.name, operation.args, results[0])]
        for tensor, record in zip(results, records, strict=False):
            self._learn(tensor, record)
        if operation.changed is not None:
            self._tell_base(operation, results[0])

    def soften(self, made: Made, result: Tensor) -> None:
        """Learn that ``result`` is a softmax."""
        module = self._owner()
        if module is None:
            return
        softmax = Softmax(made.logits, made.product, made.axis, module)
        axes = Axes(made.product.axes.all - {made.axis}, frozenset({made.axis}))
        self._known[result] = Weights((softmax,), axes, strict=made.axis != made.logits.ndim - 1)
        self._unused.add(softmax)

    def _tracked(self, operation: Operation) -> Tracked:
        if not len(self._known):
            return []
        found = ((place, value, self.get(value)) for place, value in enumerate(operation.operands))
        return [each for each in found if each[2] is not None]

    def _used(self, weights: Weights) -> None:
        for softmax in weights.softmaxes:
            self._attend(softmax, weights)

    def _learn(self, tensor: Any, record: Record | None) -> None:
        if record is not None:
            self._known[tensor] = record
        elif isinstance(tensor, Tensor):
            self._known.pop(tensor, None)

    def _tell_base(self, operation: Operation, view: Tensor) -> None:
        """Tell of a write into a view to the tensor that it is a view of."""
        base, record = view._base, self.get(view)
        if base is None or record is None:
            return
        filled = operation.name != "copy" and "out" not in operation.kwargs
        if isinstance(record, ScoreProvenance):
            own = self.get(base)
            filled = filled and not (
                operation.name == "setitem" and isinstance(operation.args[2], Tensor)
            )
            told: Record | None = base_after_write(view, record, base, own, filled=filled)
            self._learn(base, told or own)
        elif isinstance(record, Weights) and not filled and base.is_contiguous():
            own = self.get(base)
            axes = onto(base, view, record.axes)
            self._known[base] = united(
                [record, own], axes | own.axes if isinstance(own, Weights) else axes
            )

    def _next(
        self, operation: Operation, tracked: Tracked, results: list[Any], *, many: bool
    ) -> Sequence[Record | None]:
        _, tensor, record = tracked[0]
        name, args, kwargs = operation.name, operation.args, operation.kwargs
        if name in PRODUCTS:
            return [self._multiplied(operation, tracked, results[0])]
        made = next_by_hand(operation, tensor, record, self.get, self._copy)
        if isinstance(made, tuple):
            self.soften(made[0], results[0])
            return [self.get(results[0])]
        if made is not None or isinstance(record, Exponential | Total | LogTotal | Made):
            return [made]
        if isinstance(record, Outer):
            return [
                summed_outer(record, dimensions(args, kwargs, tensor), kwargs)
                if name == "sum"
                else None
            ]
        weights = [(each, known) for _, each, known in tracked if isinstance(known, Weights)]
        if weights:
            tensor, record = weights[0]
        carried = carry(name, operation.function, args, kwargs, tensor, record.axes, results)
        if weights:
            if carried[0] is None and name not in READS:
                self._used(
                    united((known for _, known in weights), record.axes)
                )  # a function that is not known: hardly for nothing
            if len({id(known) for _, known in weights}) > 1:
                return [
                    None if c is None else united((known for _, known in weights), c.axes)
                    for c in carried
                ]
            return [
                None if c is None else next_weights(record, c, tensor, r)
                for c, r in zip(carried, results, strict=False)
            ]
        if name in JOINS:
            return [self._joined(operation, tensor, record, carried[0])]
        parts: Sequence[int | None] = range(len(results)) if many else [None]
        return [
            None if c is None else self._moved(operation, tracked, c, p)
            for p, c in zip(parts, carried, strict=False)
        ]

    def _moved(
        self, operation: Operation, tracked: Tracked, carried: Carried, part: int | None
    ) -> ScoreProvenance | None:
        """What scores become by a view, by arithmetic, or by a choice of their elements."""
        position, tensor = tracked[0][:2]
        product: ScoreProvenance = tracked[0][2]
        name, args, kwargs = operation.name, operation.args, operation.kwargs
        if len({id(record) for _, _, record in tracked}) > 1:
            if not all(
                isinstance(record, ScoreProvenance) and record.shift is None
                for _, _, record in tracked
            ):
                return None
            together: Cells = nothing
            for _, _, record in tracked:
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
        return moved(
            name,
            product,
            carried,
            replayed(operation.function, args, kwargs, tensor, product.cells, part),
        )

    def _joined(
        self,
        operation: Operation,
        tensor: Tensor,
        product: ScoreProvenance,
        carried: Carried | None,
    ) -> ScoreProvenance | None:
        """What tensors of scores, and others, become when they are joined."""
        args, kwargs = operation.args, operation.kwargs
        tensors = args[0] if args else kwargs["tensors"]
        records = [self.get(each) for each in tensors]
        if carried is None or not all(
            r is None or (isinstance(r, ScoreProvenance) and r.shift is None) for r in records
        ):
            return None
        pieces = [
            (t.shape, t.device, None if r is None else r.cells)
            for t, r in zip(tensors, records, strict=True)
        ]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % max(1, tensor.ndim)
        widths = (
            tuple(t.shape[dim] for t in tensors)
            if operation.name != "stack" and carried.axes.columns == {dim}
            else ()
        )
        fills = tuple(fill for r in records if r is not None for fill in r.fills)
        wide = [r for r, width in zip(records, widths, strict=False) if width > 1]
        alone = len(wide) == 1 and isinstance(
            wide[0], ScoreProvenance
        )  # the others are a column each, as a sink is
        first = wide[0] if alone else product.opaque()
        cells = joined(operation.function, pieces, args, kwargs)
        return replace(
            first, axes=carried.axes, cells=cells, masked=True, fills=fills, pieces=widths
        )

    def _multiplied(
        self, operation: Operation, tracked: Tracked, result: Tensor
    ) -> ScoreProvenance | Weights | None:
        """What a product with something known is: a new one, or the old one with its heads
        mixed.
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
                    return (
                        replace(record.opaque(), axes=axes, cells=nothing)
                        if record.shift is None
                        else None
                    )
        if any(isinstance(record, Weights) for _, _, record in tracked):
            return None
        return product_of(name, args, kwargs, result)


def pieces_of_padding(operation: Operation, tensor: Tensor, carried: Carried) -> tuple[int, ...]:
    """The pieces of scores that were padded by one column, as softmax-off-by-one does."""
    if carried.axes.columns != {tensor.ndim - 1}:
        return ()
    given = tuple(operation.kwargs.get("pad", operation.args[1] if len(operation.args) > 1 else ()))
    keys = tensor.shape[-1]
    return {(1, 0): (1, keys), (0, 1): (keys, 1)}.get(given, ())
