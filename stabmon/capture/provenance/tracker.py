"""Records of a forward's living tensors, learned from every operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from stabmon.capture.provenance.axes import Axes, carry
from stabmon.capture.provenance.buffers import after_set_item, base_after_write, onto
from stabmon.capture.provenance.exponentials import Exponential, Made, Mixed, Use
from stabmon.capture.provenance.manual_softmax import HandMade, next_by_hand, scores_overwritten
from stabmon.capture.provenance.multiply import PRODUCTS
from stabmon.capture.provenance.next_scores import (
    Tracked,
    multiplied,
    scores_joined,
    scores_moved,
)
from stabmon.capture.provenance.operations import Operation
from stabmon.capture.provenance.outer import Outer, outer_of, summed_outer
from stabmon.capture.provenance.products import ScoreProvenance, product_of
from stabmon.capture.provenance.weights import (
    READS,
    SUMS,
    Attend,
    Softmax,
    Weights,
    dimensions,
    is_use,
    next_weights,
    united,
)

Record = ScoreProvenance | Weights | HandMade | Outer
JOINS = {"cat", "concat", "concatenate", "stack"}


class Provenance:
    """Living tensors of a forward that came of a product of queries and keys.

    Args:
        attend: receives each softmax when something is summed with its weights.
        owner: returns the module whose code is running, None where it is none of the model's.
    """

    def __init__(self, attend: Attend, owner: Callable[[], nn.Module | None]) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._unused: weakref.WeakSet[Softmax] = weakref.WeakSet()
        self._attend = attend
        self._owner = owner
        self._copy: Tensor | None = None

    def get(self, tensor: object) -> Any:
        """Return what is known of ``tensor``, None for nothing."""
        return self._known.get(tensor) if isinstance(tensor, Tensor) else None

    def before(self, operation: Operation) -> None:
        """Note whether an operation about to be made uses weights or overwrites scores."""
        self._copy = None
        if not len(self._known):
            return
        if operation.name in PRODUCTS or operation.name in SUMS:
            for _, tensor, record in self._tracked(operation):
                if isinstance(record, Weights) and is_use(
                    operation.name, operation.args, operation.kwargs, tensor, record
                ):
                    self._use(record)
        changed = operation.changed
        if changed is not None:
            for softmax in list(self._unused):
                softmax.keep_from(changed)
            self._copy = scores_overwritten(operation, self.get(changed))

    def after(self, operation: Operation, result: Any) -> None:
        """Learn from an operation that the model has made."""
        if operation.name == "setitem":
            target, index, value = operation.args
            own, given = self.get(target), self.get(value)
            self._learn(target, after_set_item(target, index, value, own, given))
            self._write_to_base(operation, target)
            return
        results = list(result) if isinstance(result, list | tuple) else [result]
        if not results or not isinstance(results[0], Tensor) or not results[0].is_floating_point():
            return
        tracked = self._tracked(operation)
        records: Sequence[Record | None]
        if tracked:
            records = self._next(operation, tracked, results, many=isinstance(result, list | tuple))
        elif operation.name in PRODUCTS:
            records = [product_of(operation.name, operation.args, operation.kwargs, results[0])]
        else:
            records = [outer_of(operation.name, operation.args, results[0])]
        for tensor, record in zip(results, records, strict=False):
            self._learn(tensor, record)
        if operation.changed is not None:
            self._write_to_base(operation, results[0])

    def soften(self, made: Made, result: Tensor) -> None:
        """Learn that ``result`` is a softmax."""
        weights = self._weights_of(made)
        if weights is not None:
            self._known[result] = weights
            self._unused.update(weights.softmaxes)

    def _weights_of(self, made: Made) -> Weights | None:
        module = self._owner()
        if module is None:
            return None
        softmax = Softmax(made.logits, made.product, made.axis, module)
        axes = Axes(made.product.axes.all - {made.axis}, frozenset({made.axis}))
        return Weights((softmax,), axes, strict=made.axis != made.logits.ndim - 1)

    def _tracked(self, operation: Operation) -> Tracked:
        if not len(self._known):
            return []
        found = ((place, value, self.get(value)) for place, value in enumerate(operation.operands))
        return [each for each in found if each[2] is not None]

    def _use(self, weights: Weights) -> None:
        for softmax in weights.softmaxes:
            self._attend(softmax, weights)

    def _learn(self, tensor: Any, record: Record | None) -> None:
        if record is not None:
            self._known[tensor] = record
        elif isinstance(tensor, Tensor):
            self._known.pop(tensor, None)

    def _write_to_base(self, operation: Operation, view: Tensor) -> None:
        """Learn of the tensor that ``view`` is a view of that a part of it was written."""
        # Private, checked with torch 2.13: None for what is no view. Without it, scores written
        # into views of a buffer are lost, and attention over that buffer is not recorded.
        base, record = view._base, self.get(view)
        if base is None or record is None:
            return
        own = self.get(base)
        filled = operation.name != "copy" and "out" not in operation.kwargs
        if isinstance(record, ScoreProvenance):
            filled = filled and not (
                operation.name == "setitem" and isinstance(operation.args[2], Tensor)
            )
            after: Record | None = base_after_write(view, record, base, own, filled=filled)
            self._learn(base, after or own)
        elif isinstance(record, Weights) and not filled and base.is_contiguous():
            axes = onto(base, view, record.axes)
            self._known[base] = united(
                [record, own], axes | own.axes if isinstance(own, Weights) else axes
            )

    def _next(
        self, operation: Operation, tracked: Tracked, results: list[Any], *, many: bool
    ) -> Sequence[Record | None]:
        """Return what is known of each result of an operation on known tensors."""
        _, tensor, record = tracked[0]
        name, args, kwargs = operation.name, operation.args, operation.kwargs
        if name in PRODUCTS and not any(isinstance(each, Exponential) for *_, each in tracked):
            return [multiplied(operation, tracked, results[0])]
        parts_of_softmax = [each for each in tracked if isinstance(each[2], Exponential | Mixed)]
        _, part, known_part = (parts_of_softmax or tracked)[0]
        made = next_by_hand(operation, part, known_part, self.get, self._copy, results[0])
        if isinstance(made, tuple | Use):
            self._known.pop(part, None)  # it would keep the scores alive
            if isinstance(made, Use):
                weights_used = self._weights_of(made.made)
                if weights_used is not None:
                    self._use(weights_used)
                return [None]
            self.soften(made[0], results[0])
            return [self.get(results[0])]
        if made is not None or isinstance(record, HandMade):
            return [made]
        if isinstance(record, Outer):
            if name != "sum":
                return [None]
            return [summed_outer(record, dimensions(args, kwargs, tensor), kwargs)]
        weights = [(each, known) for _, each, known in tracked if isinstance(known, Weights)]
        if weights:
            tensor, record = weights[0]
        carried = carry(name, operation.function, args, kwargs, tensor, record.axes, results)
        if weights:
            all_weights = [known for _, known in weights]
            if carried[0] is None and name not in READS:
                # a function that is not known is hardly called without a use
                self._use(united(all_weights, record.axes))
            if len({id(known) for known in all_weights}) > 1:
                return [None if c is None else united(all_weights, c.axes) for c in carried]
            return [
                None if c is None else next_weights(record, c, tensor, r)
                for c, r in zip(carried, results, strict=False)
            ]
        if name in JOINS:
            return [scores_joined(operation, tensor, record, carried[0], self.get)]
        parts: Sequence[int | None] = range(len(results)) if many else [None]
        return [
            None if c is None else scores_moved(operation, tracked, c, p)
            for p, c in zip(parts, carried, strict=False)
        ]
