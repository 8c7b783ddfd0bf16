"""Softmaxes made by hand: exp over its sum, or exp of scores minus logsumexp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.function_mode import isolated
from stabmon.capture.protocol import bind
from stabmon.capture.provenance.axes import VIEWS
from stabmon.capture.provenance.cells import held
from stabmon.capture.provenance.exponentials import (
    Exponential,
    LogTotal,
    Made,
    Mixed,
    Total,
    Use,
    completed,
    narrower,
    of_same_scores,
    weighted,
)
from stabmon.capture.provenance.multiply import PRODUCTS, sums
from stabmon.capture.provenance.operations import Operation
from stabmon.capture.provenance.products import DIVIDES, KEEPS, TIMES, ScoreProvenance, scaled
from stabmon.capture.provenance.weights import dimensions

SMALL = 1e-6
"""Most that is added to a sum of exponentials against division by zero."""
ADDITIONS = {"add", "iadd", "radd"}
SUBTRACTIONS = {"sub", "isub", "subtract"}
MASKINGS = {"masked_fill", "where", "tril", "triu"}
"""Operations that set exponentials to 0, by which keys are hidden after exp."""

HandMade = Exponential | Total | LogTotal | Made | Mixed


def next_by_hand(
    operation: Operation,
    tensor: Tensor,
    record: Any,
    get: Callable[[object], Any],
    copy: Tensor | None,
    result: Tensor,
) -> HandMade | tuple[Made] | Use | None:
    """Follow a part of a hand-made softmax through one operation.

    Args:
        operation: the operation that the model has made.
        tensor: the first of its operands of which something is known.
        record: what is known of it.
        get: returns what is known of a tensor.
        copy: the scores, where the operation has overwritten them.
        result: the operation's result.

    Returns:
        The part that it becomes; the softmax as ``(made,)`` where it is complete, or as a use where
        values have been summed with its exponentials already; None for anything else.
    """
    name = operation.name
    if isinstance(record, ScoreProvenance):
        return of_scores(operation, tensor, record, get, copy, result)
    if isinstance(record, Exponential):
        return of_exponential(operation, tensor, record, get, result)
    if isinstance(record, Mixed):
        if name in KEEPS:
            return record
        made = divided(operation, tensor, record.of, get)
        return Use(made) if made is not None and made.axis in record.over else None
    if isinstance(record, Total):
        if name in KEEPS | VIEWS:
            return replace(record, dtype=narrower(record.dtype, result.dtype))
        return next_total(record, name, operation.others(tensor))
    if isinstance(record, LogTotal):
        if name in ADDITIONS and any(
            other is record.product.shift for other in operation.others(tensor)
        ):
            return replace(record, of=None, product=replace(record.product, shift=None))
        return record if name in KEEPS | VIEWS else None
    if isinstance(record, Made) and name == "exp":
        return (record,)
    return record if isinstance(record, Made) and name in KEEPS else None


def of_scores(
    operation: Operation,
    tensor: Tensor,
    product: ScoreProvenance,
    get: Callable[[object], Any],
    copy: Tensor | None,
    result: Tensor,
) -> HandMade | None:
    """Return the part of a softmax that an operation on scores makes, if any."""
    name = operation.name
    if name in ("exp", "exp2"):
        logits = tensor if copy is None else copy
        if name == "exp2":
            with isolated():
                logits = logits.detach() * math.log(2)
            product = scaled(product, math.log(2))
        return Exponential(held(logits), held(logits), product, product.axes, result.dtype)
    if name in ("logsumexp", "log_softmax"):
        over = dimensions(operation.args, operation.kwargs, tensor)
        if len(over) == 1 and over <= product.axes.all:
            (axis,) = over
            if name == "logsumexp":
                return LogTotal(tensor, product, axis)
            return Made(tensor, product, axis)
    if name in SUBTRACTIONS and operation.args[0] is tensor:
        known = [(each, get(each)) for each in operation.others(tensor)]
        for other, total in known:
            if isinstance(total, LogTotal) and (
                total.of is tensor or of_same_scores(total.product, product)
            ):
                product = replace(product, explicit=total.explicit)
                if operation.changed is None:
                    return Made(tensor, product, total.axis)
                if product.shift is None:  # the scores were overwritten
                    return Made(tensor, replace(product, shift=other), total.axis)
    return None


def of_exponential(
    operation: Operation,
    tensor: Tensor,
    record: Exponential,
    get: Callable[[object], Any],
    result: Tensor,
) -> HandMade | tuple[Made] | None:
    """Return the part of a softmax that an operation on exponentials makes, if any."""
    name, args, kwargs = operation.name, operation.args, operation.kwargs
    if name in KEEPS:
        return replace(record, dtype=narrower(record.dtype, result.dtype))
    if name == "sum":
        over = dimensions(args, kwargs, tensor)
        one = len(over) == 1 and over <= record.axes.all
        return Total(record, next(iter(over)), result.dtype) if one else None
    if name == "normalize":
        given = bind(("input", "p", "dim"), args, kwargs)
        if given.get("p", 2.0) != 1:
            return None
        made = completed(record, given.get("dim", 1) % tensor.ndim, tensor.dtype)
        return None if made is None else (made,)
    if name in PRODUCTS:
        over = frozenset().union(*(each.over for each in sums(name, args, kwargs, tensor)))
        return Mixed(record, over) if over & record.axes.all else None
    made = divided(operation, tensor, record, get)
    if made is not None:
        return (made,)
    unknown = all(get(other) is None for other in operation.others(tensor))
    return weighted(operation, tensor, record) if unknown and name in TIMES | MASKINGS else None


def divided(
    operation: Operation, tensor: Tensor, record: Exponential, get: Callable[[object], Any]
) -> Made | None:
    """Return the softmax that a division by the sum of exponentials makes, if it is one."""
    known = (get(other) for other in operation.others(tensor))
    total = next((each for each in known if isinstance(each, Total)), None)
    if total is None or not total.of.is_alike(record):
        return None
    over = operation.name in DIVIDES and operation.args[0] is tensor and not total.inverse
    if over or (operation.name in TIMES and total.inverse):
        return completed(record, total.axis, total.dtype)
    return None


def next_total(total: Total, name: str, others: list[Any]) -> Total | LogTotal | None:
    """Return what a sum of exponentials becomes by one operation."""
    if name in ADDITIONS | {"clamp", "clamp_min", "maximum"}:
        small = all(isinstance(other, int | float) and 0 <= other <= SMALL for other in others)
        return total if small else None
    if name == "reciprocal" or (name in ("rdiv", "rtruediv", *DIVIDES) and others in ([1], [1.0])):
        return replace(total, inverse=True)
    if name == "log" and not total.inverse:
        made = completed(total.of, total.axis, total.dtype)
        if made is None:
            return None
        return LogTotal(made.logits, made.product, made.axis, made.product.explicit)
    return None


def scores_overwritten(operation: Operation, record: Any) -> Tensor | None:
    """Return a copy of scores that ``exp_`` is about to overwrite."""
    changed = operation.changed
    if (
        operation.name not in ("exp", "exp2")
        or changed is None
        or not isinstance(record, ScoreProvenance)
    ):
        return None
    with torch.no_grad():
        return changed.detach().clone()
