"""Where the tensors of a forward come from: products of queries and keys, followed to a softmax and on to its use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from stabmon.capture.axes import RESIZES, VIEWS, Axes, Carried, carry, covers, is_advanced, modes_off
from stabmon.capture.masking import either, joined, nothing, padded, replayed, written
from stabmon.capture.multiply import PRODUCTS, sums
from stabmon.capture.outer import Outer, outer_of, summed_outer
from stabmon.capture.products import KEEPS, TIMES, Product, is_number, moved, product_of, step
from stabmon.capture.weights import (
    Attend,
    Exponential,
    LogTotal,
    LogWeights,
    Softmax,
    Total,
    Weights,
    dimensions,
    is_use,
    next_total,
    next_weights,
)

Record = Product | Weights | Exponential | Total | LogTotal | LogWeights | Outer
JOINS = {"cat", "concat", "concatenate", "stack"}
IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv"}


def operation(function: Callable[..., Any]) -> str:
    """The name of a torch function, without underscores; of a property, the property's."""
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name.removeprefix("special_").strip("_")


def flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call in order, those in a list as if they stood alone."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()):
        found.extend(value) if isinstance(value, list | tuple) else found.append(value)
    return found


@dataclass
class Call:
    """One operation that the model makes."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Provenance:
    """Which of a forward's living tensors came of a product of queries and keys."""

    def __init__(self, attend: Attend, owner: Callable[[], nn.Module | None]) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._unused: weakref.WeakSet[Softmax] = weakref.WeakSet()
        self._attend = attend
        self._owner = owner
        self._copy: Tensor | None = None

    def get(self, tensor: object) -> Any:
        """What is known of ``tensor``."""
        return self._known.get(tensor) if isinstance(tensor, Tensor) else None

    def tracked(self, call: Call) -> list[tuple[int, Tensor, Any]]:
        """The arguments of which something is known, with their places."""
        if not len(self._known):
            return []
        values = enumerate(flat(call.args, call.kwargs))
        return [(place, value, record) for place, value in values if (record := self.get(value)) is not None]

    def before(self, call: Call) -> None:
        """Look at an operation that is about to be made: whether it uses weights, and what it overwrites."""
        self._copy = None
        if not len(self._known):
            return
        if call.name in PRODUCTS or call.name in ("sum", "nansum", "mean"):
            for _, tensor, record in self.tracked(call):
                if isinstance(record, Weights) and is_use(call.name, call.args, call.kwargs, tensor, record):
                    self._attend(record.softmax, record)
        changed = call.kwargs.get("out", call.args[0] if call.args and changes_first(call) else None)
        if isinstance(changed, Tensor):
            for softmax in list(self._unused):
                softmax.keep_from(changed)
            if call.name == "exp" and isinstance(self.get(changed), Product):
                self._copy = changed.detach().clone()

    def after(self, call: Call, result: Any) -> None:
        """Learn from an operation that the model has made."""
        if call.name == "setitem":
            self._set_item(call)
            return
        results = list(result) if isinstance(result, list | tuple) else [result]
        if not results or not isinstance(results[0], Tensor) or not results[0].is_floating_point():
            return
        tracked = self.tracked(call)
        if tracked:
            records = self._next(call, tracked, results, many=isinstance(result, list | tuple))
        elif call.name in PRODUCTS:
            records = [product_of(call.name, call.args, call.kwargs, results[0])]
        else:
            records = [outer_of(call.name, call.args, results[0])]
        for tensor, record in zip(results, records, strict=False):
            if record is not None:
                self._known[tensor] = record
                if isinstance(record, Product) and (changes_first(call) or "out" in call.kwargs):
                    self._tell_base(tensor, record, filled=call.name != "copy" and "out" not in call.kwargs)
            elif tracked and isinstance(tensor, Tensor) and tensor in self._known and changes_first(call):
                del self._known[tensor]

    def soften(self, logits: Tensor, product: Product, axis: int, result: Tensor) -> None:
        """Learn that ``result`` is the softmax of ``logits`` along ``axis``."""
        module = self._owner()
        if module is None:
            return
        softmax = Softmax(logits, product, axis, module)
        axes = Axes(product.axes.all - {axis}, frozenset({axis}))
        self._known[result] = Weights(softmax, axes, strict=axis != logits.ndim - 1)
        self._unused.add(softmax)

    def _next(self, call: Call, tracked: list[tuple[int, Tensor, Any]], results: list[Any], *, many: bool) -> list[Any]:
        _, tensor, record = tracked[0]
        result = results[0]
        name = call.name
        if name in PRODUCTS:
            return [self._multiplied(call, tracked, result)]
        made = self._normalised(call, tensor, record, result)
        if made is not None:
            return [made]
        if isinstance(record, Outer):
            return [summed_outer(name, record, dimensions(call.args, call.kwargs, tensor), result, call.kwargs)]
        if isinstance(record, Total):
            others = [value for value in flat(call.args, call.kwargs) if value is not tensor]
            return [record if name in KEEPS | VIEWS else next_total(record, name, others)]
        if isinstance(record, Exponential | LogTotal | LogWeights):
            return [record if name in KEEPS | {"unsqueeze"} else None]
        carried = carry(name, call.function, call.args, call.kwargs, tensor, record.axes, results)
        if isinstance(record, Weights):
            return [None if c is None else next_weights(record, c, tensor, r) for c, r in zip(carried, results, strict=False)]
        if name in JOINS:
            return [self._joined(call, tracked, carried[0])]
        parts: Sequence[int | None] = range(len(results)) if many else [None]
        return [None if c is None else self._product(call, tracked, c, p) for p, c in zip(parts, carried, strict=False)]

    def _product(self, call: Call, tracked: list[tuple[int, Tensor, Any]], carried: Carried, part: int | None) -> Product | None:
        position, tensor, product = tracked[0]
        if len({id(record) for _, _, record in tracked}) > 1:
            if not all(isinstance(record, Product) and record.shift is None for _, _, record in tracked):
                return None
            cells = nothing
            for _, _, record in tracked:
                cells = either(cells, record.cells)
            return replace(product.opaque(), axes=carried.axes, cells=cells, masked=True)
        if call.name in VIEWS | RESIZES:
            if call.name == "pad":
                cells = padded(call.args, call.kwargs, tensor, product.cells)
            else:
                cells = replayed(call.function, call.args, call.kwargs, tensor, product.cells, part)
            if product.shift is not None:
                if call.name not in VIEWS or part is not None:
                    return None
                with modes_off(), torch.no_grad():
                    wide = product.shift.detach().expand(tensor.shape)
                    product = replace(product, shift=call.function(wide, *call.args[1:], **call.kwargs))
            return replace(moved(call.name, product, carried, cells), **piece_of_padding(call, tensor, carried))
        others = [value for value in flat(call.args, call.kwargs) if value is not tensor]
        after = step(call.name, product, others, position)
        return None if after is None else replace(after, axes=carried.axes)

    def _joined(self, call: Call, tracked: list[tuple[int, Tensor, Any]], carried: Carried | None) -> Product | None:
        tensors = call.args[0] if call.args else call.kwargs["tensors"]
        records = [self.get(each) for each in tensors]
        if carried is None or not all(
            record is None or (isinstance(record, Product) and record.shift is None) for record in records
        ):
            return None
        known = zip(tensors, records, strict=True)
        pieces = [(each.shape, each.device, None if record is None else record.cells) for each, record in known]
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0) % max(1, tracked[0][1].ndim)
        widths = tuple(each.shape[dim] for each in tensors) if call.name != "stack" and carried.axes.columns == {dim} else ()
        cells = joined(call.function, pieces, call.args, call.kwargs)
        fills = tuple(fill for record in records if record is not None for fill in record.fills)
        wide = [record for record, width in zip(records, widths, strict=False) if width > 1]
        alone = len(wide) == 1 and isinstance(wide[0], Product)  # the others are a column each, as a sink is
        first = wide[0] if alone else tracked[0][2].opaque()
        return replace(first, axes=carried.axes, cells=cells, masked=True, fills=fills, pieces=widths)

    def _multiplied(self, call: Call, tracked: list[tuple[int, Tensor, Any]], result: Tensor) -> Record | None:
        """What a product with a tracked tensor is: a new one, or the old one with its heads mixed."""
        for _, tensor, record in tracked:
            if not isinstance(record, Product | Weights):
                continue
            for each in sums(call.name, call.args, call.kwargs, tensor):
                if not each.over & record.axes.all and record.axes.all <= each.places.keys():
                    axes = record.axes.at(each.places.__getitem__)
                    if isinstance(record, Weights):
                        return replace(record, axes=axes, kept=None)
                    return replace(record.opaque(), axes=axes, cells=nothing, shift=None) if record.shift is None else None
        if any(isinstance(record, Weights) for _, _, record in tracked):
            return None
        return product_of(call.name, call.args, call.kwargs, result)

    def _normalised(self, call: Call, tensor: Tensor, record: Any, result: Tensor) -> Record | None:
        """Follow a softmax that is made by hand."""
        name, args, kwargs = call.name, call.args, call.kwargs
        if isinstance(record, Product) and name in ("exp", "logsumexp", "log_softmax"):
            if name == "exp":
                return Exponential(tensor if self._copy is None else self._copy, record, record.axes)
            over = dimensions(args, kwargs, tensor)
            if len(over) != 1 or not over <= record.axes.all:
                return None
            (axis,) = over
            return LogTotal(tensor, axis) if name == "logsumexp" else LogWeights(tensor, record, axis, record.axes)
        if isinstance(record, Exponential) and name == "sum":
            over = dimensions(args, kwargs, tensor)
            return Total(record, next(iter(over))) if len(over) == 1 and over <= record.axes.all else None
        if isinstance(record, LogWeights) and name == "exp":
            return self._made(record.logits, record.product, record.axis, result)
        others = [self.get(value) for value in flat(args, kwargs) if value is not tensor]
        total = others[0] if len(others) >= 1 else None
        if (
            isinstance(record, Product)
            and name == "sub"
            and isinstance(total, LogTotal)
            and total.of is tensor
            and args[0] is tensor
        ):
            return LogWeights(tensor, record, total.axis, record.axes)
        if isinstance(record, Exponential) and isinstance(total, Total) and total.of is record:
            divided = name in ("div", "truediv", "itruediv", "divide", "true_divide") and args[0] is tensor and not total.inverse
            if divided or (name in TIMES and total.inverse):
                return self._made(record.logits, record.product, total.axis, result)
        if isinstance(record, Exponential) and name == "normalize":
            given = {**dict(zip(("input", "p", "dim"), args, strict=False)), **kwargs}
            if given.get("p", 2.0) == 1:
                return self._made(record.logits, record.product, given.get("dim", 1) % tensor.ndim, result)
        return None

    def _made(self, logits: Tensor, product: Product, axis: int, result: Tensor) -> Record | None:
        self.soften(logits, product, axis, result)
        return self.get(result)

    def _set_item(self, call: Call) -> None:
        target, index, value = call.args
        if not isinstance(target, Tensor) or not target.is_floating_point():
            return
        own, given = self.get(target), self.get(value)
        if not isinstance(own, Product) and not isinstance(given, Product):
            return
        if isinstance(own, Product) and not isinstance(given, Product):
            after = step("setitem", own, [value]) if is_number(value) else own.opaque()
            assert after is not None
            everywhere = lambda: torch.ones((), dtype=torch.bool, device=target.device)  # noqa: E731
            cells = written(target.shape, target.device, own.cells, lambda whole, new: whole.__setitem__(index, new), everywhere)
            self._known[target] = replace(after, cells=cells, masked=True)
            self._tell_base(target, self._known[target], filled=is_number(value))
            return
        if given.shift is not None or (isinstance(own, Product) and own.shift is not None):
            self._known.pop(target, None)
            return
        axes = axes_written(target, index, value, given.axes)
        if isinstance(own, Product):
            axes = own.axes if axes is None else Axes(axes.rows | own.axes.rows, axes.columns | own.axes.columns)
        if axes is None:
            return
        before = own.cells if isinstance(own, Product) else None
        cells = written(target.shape, target.device, before, lambda whole, new: whole.__setitem__(index, new), given.cells)
        self._known[target] = replace(given.opaque(), axes=axes, cells=cells, masked=True, pieces=())
        self._tell_base(target, self._known[target], filled=False)

    def _tell_base(self, view: Tensor, record: Product, *, filled: bool) -> None:
        """Tell of a write into a view to the tensor that it is a view of; ``filled`` where it was a mask and no other scores."""
        base = view._base
        if base is None or not base.is_contiguous() or not base.is_floating_point():
            return
        own = self.get(base)
        if (
            (own is not None and not isinstance(own, Product))
            or record.shift is not None
            or getattr(own, "shift", None) is not None
        ):
            return
        geometry = view.shape, view.stride(), view.storage_offset() - base.storage_offset()
        place = [covers(base, view.stride(d), view.shape[d]) for d in range(view.ndim)]
        rows, columns = (frozenset(d for v in some for d in place[v]) for some in (record.axes.rows, record.axes.columns))
        axes = Axes(rows | own.axes.rows, columns | own.axes.columns) if isinstance(own, Product) else Axes(rows, columns)
        put = lambda whole, new: whole.as_strided(*geometry).copy_(new)  # noqa: E731
        cells = written(base.shape, base.device, own.cells if isinstance(own, Product) else None, put, record.cells)
        same = own if isinstance(own, Product) and filled else (own or record).opaque()
        self._known[base] = replace(same, axes=axes, cells=cells, masked=True, fills=same.fills + record.fills)


def piece_of_padding(call: Call, tensor: Tensor, carried: Carried) -> dict[str, tuple[int, ...]]:
    """The pieces of scores that were padded by one column of zeros, which softmax-off-by-one does."""
    if call.name != "pad" or carried.axes.columns != {tensor.ndim - 1}:
        return {}
    given = tuple(call.kwargs.get("pad", call.args[1] if len(call.args) > 1 else ()))
    keys = tensor.shape[-1]
    return {"pieces": {(1, 0): (1, keys), (0, 1): (keys, 1)}.get(given, ())}


def changes_first(call: Call) -> bool:
    """Whether an operation changes its first argument."""
    name: str = getattr(call.function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or call.name in IN_PLACE


def axes_written(target: Tensor, index: Any, value: Tensor, axes: Axes) -> Axes | None:
    """The axes of ``target`` after ``target[index] = value``."""
    if is_advanced(index):
        return axes if value.ndim == target.ndim else None
    with modes_off():
        probe = torch.empty(target.shape, device="meta")
        part = probe[index]
    more = part.ndim - value.ndim
    if more < 0:
        return None
    place = [covers(probe, part.stride(d), part.shape[d]) for d in range(part.ndim)]
    rows, columns = (frozenset(d for v in some for d in place[v + more]) for some in (axes.rows, axes.columns))
    return Axes(rows, columns)
