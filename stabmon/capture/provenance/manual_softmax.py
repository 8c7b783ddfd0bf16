"""Softmaxes made by hand: exp over its sum, or exp of scores minus logsumexp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.protocol import bind
from stabmon.capture.provenance.axes import VIEWS, Axes
from stabmon.capture.provenance.operations import Operation
from stabmon.capture.provenance.products import DIVIDES, KEEPS, TIMES, ScoreProvenance
from stabmon.capture.provenance.weights import dimensions

SMALL = 1e-6
"""Most that is added to a sum of exponentials against division by zero."""


@dataclass(frozen=True, eq=False)
class Exponential:
    """Exponentials of scores."""

    logits: Tensor
    product: ScoreProvenance
    axes: Axes


@dataclass(frozen=True, eq=False)
class Total:
    """The sum of exponentials along one dimension, or its inverse."""

    of: Exponential
    axis: int
    inverse: bool = False


@dataclass(frozen=True, eq=False)
class LogTotal:
    """The logarithm of the sum of exponentials of scores along one dimension."""

    of: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class Made:
    """A softmax that is complete, or whose logarithm is."""

    logits: Tensor
    product: ScoreProvenance
    axis: int


HandMade = Exponential | Total | LogTotal | Made


def next_by_hand(
    operation: Operation,
    tensor: Tensor,
    record: Any,
    get: Callable[[object], Any],
    copy: Tensor | None,
) -> HandMade | tuple[Made] | None:
    """Follow a part of a hand-made softmax through one operation.

    Args:
        operation: the operation that the model has made.
        tensor: the first of its operands of which something is known.
        record: what is known of it.
        get: returns what is known of a tensor.
        copy: the scores, where the operation has overwritten them.

    Returns:
        The part that it becomes; the softmax as ``(made,)`` where it is complete; None for anything
        else.
    """
    if isinstance(record, ScoreProvenance):
        return of_scores(operation, tensor, record, get, copy)
    if isinstance(record, Exponential):
        return of_exponential(operation, tensor, record, get)
    if isinstance(record, Total):
        if operation.name in KEEPS | VIEWS:
            return record
        return next_total(record, operation.name, operation.others(tensor))
    if isinstance(record, Made) and operation.name == "exp":
        return (record,)
    kept = isinstance(record, Made | LogTotal) and operation.name in KEEPS | {"unsqueeze"}
    return record if kept else None


def of_scores(
    operation: Operation,
    tensor: Tensor,
    product: ScoreProvenance,
    get: Callable[[object], Any],
    copy: Tensor | None,
) -> HandMade | None:
    """Return the part of a softmax that an operation on scores makes, if any."""
    name = operation.name
    if name == "exp":
        return Exponential(tensor if copy is None else copy, product, product.axes)
    if name in ("logsumexp", "log_softmax"):
        over = dimensions(operation.args, operation.kwargs, tensor)
        if len(over) == 1 and over <= product.axes.all:
            (axis,) = over
            return LogTotal(tensor, axis) if name == "logsumexp" else Made(tensor, product, axis)
    if name == "sub" and operation.args[0] is tensor:
        known = (get(other) for other in operation.others(tensor))
        total = next((each for each in known if isinstance(each, LogTotal)), None)
        if total is not None and total.of is tensor:
            return Made(tensor, product, total.axis)
    return None


def of_exponential(
    operation: Operation, tensor: Tensor, record: Exponential, get: Callable[[object], Any]
) -> HandMade | tuple[Made] | None:
    """Return the part of a softmax that an operation on exponentials makes, if any."""
    name = operation.name
    if name in KEEPS:
        return record
    if name == "sum":
        over = dimensions(operation.args, operation.kwargs, tensor)
        one = len(over) == 1 and over <= record.axes.all
        return Total(record, next(iter(over))) if one else None
    if name == "normalize":
        given = bind(("input", "p", "dim"), operation.args, operation.kwargs)
        if given.get("p", 2.0) == 1:
            return (Made(record.logits, record.product, given.get("dim", 1) % tensor.ndim),)
    known = (get(other) for other in operation.others(tensor))
    total = next((each for each in known if isinstance(each, Total)), None)
    if total is not None and total.of is record:
        divided = name in DIVIDES and operation.args[0] is tensor and not total.inverse
        if divided or (name in TIMES and total.inverse):
            return (Made(record.logits, record.product, total.axis),)
    return None


def next_total(total: Total, name: str, others: list[Any]) -> Total | None:
    """Return what a sum of exponentials becomes by one operation."""
    if name in ("add", "iadd", "radd", "clamp", "clamp_min", "maximum"):
        small = all(isinstance(other, int | float) and 0 <= other <= SMALL for other in others)
        return total if small else None
    if name == "reciprocal" or (name in ("rdiv", "rtruediv", *DIVIDES) and others in ([1], [1.0])):
        return replace(total, inverse=True)
    return None


def scores_overwritten(operation: Operation, record: Any) -> Tensor | None:
    """Return a copy of scores that ``exp_`` is about to overwrite."""
    changed = operation.changed
    if operation.name != "exp" or changed is None or not isinstance(record, ScoreProvenance):
        return None
    with torch.no_grad():
        return changed.detach().clone()
