"""Parts of a hand-made softmax: exponentials of scores, their sum, and its logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabmon.capture.function_mode import isolated
from stabmon.capture.provenance.axes import Axes
from stabmon.capture.provenance.operations import Operation
from stabmon.capture.provenance.products import TIMES, ExplicitSum, ScoreProvenance

Scores = Callable[[], Tensor | None]
"""Returns scores as they are, None where the model has overwritten them since."""


@dataclass(frozen=True, eq=False)
class Exponential:
    """Exponentials of scores."""

    argument: Scores
    """Scores that went into exp."""
    logits: Scores
    """The same, and what the exponentials were multiplied with since as its logarithm."""
    product: ScoreProvenance
    axes: Axes
    dtype: torch.dtype
    """The narrowest that they have been in."""

    def is_alike(self, other: Exponential) -> bool:
        """Return whether both are the same exponentials, up to casts."""
        return self.logits is other.logits


@dataclass(frozen=True, eq=False)
class Total:
    """The sum of exponentials along one dimension, or its inverse."""

    of: Exponential
    axis: int
    dtype: torch.dtype
    inverse: bool = False


@dataclass(frozen=True, eq=False)
class Mixed:
    """Exponentials summed with values, not divided by their own sum yet."""

    of: Exponential
    over: frozenset[int]
    """Dimensions of the exponentials that were summed over."""


@dataclass(frozen=True, eq=False)
class LogTotal:
    """The logarithm of the sum of exponentials of scores along one dimension."""

    of: Tensor | None
    """The scores, where one tensor holds them."""
    product: ScoreProvenance
    axis: int
    explicit: ExplicitSum | None = None
    """Set where the model has formed exponentials and sum by itself."""


@dataclass(frozen=True, eq=False)
class Made:
    """A softmax that is complete, or whose logarithm is."""

    logits: Tensor
    product: ScoreProvenance
    axis: int


@dataclass(frozen=True, eq=False)
class Use:
    """A softmax that is complete, with whose weights values have been summed already."""

    made: Made


def completed(record: Exponential, axis: int, sum_dtype: torch.dtype) -> Made | None:
    """Return the softmax that exponentials over their sum along ``axis`` are.

    None where the model has overwritten the scores since.
    """
    logits, argument = record.logits(), record.argument()
    if logits is None or argument is None:
        return None
    with isolated():
        largest = argument.detach().amax(axis, keepdim=True)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.detach().to(wide).logsumexp(axis, keepdim=True)
    explicit = ExplicitSum(largest.to(wide), total, logits.shape[axis], record.dtype, sum_dtype)
    return Made(logits, replace(record.product, explicit=explicit), axis)


def weighted(operation: Operation, tensor: Tensor, record: Exponential) -> Exponential | None:
    """Follow exponentials through a mask or a factor of each: ``exp(s) * w = exp(s + ln w)``.

    Args:
        operation: a multiplication, or a choice between an exponential and another value.
        tensor: the operand that is exponentials.
        record: what is known of them.

    Returns:
        None where the other value is not 0, or a factor is below 0.
    """
    logits = record.logits()
    if logits is None or "out" in operation.kwargs:
        return None

    def made_of(value: float) -> Tensor:
        probe = torch.full_like(tensor, value)
        args = [probe if each is tensor else each for each in operation.args]
        kwargs = {k: probe if v is tensor else v for k, v in operation.kwargs.items()}
        result: Tensor = operation.function(*args, **kwargs)
        return result

    with isolated():
        factor = made_of(1.0)
        if factor.shape != logits.shape or bool((~(factor >= 0) | factor.isinf()).any().item()):
            return None
        if operation.name not in TIMES and bool(made_of(0.0).any().item()):
            return None
        hidden = factor == 0
        shown = logits.detach().masked_fill(hidden, -torch.inf)
        product = record.product
        if not bool((hidden | (factor == 1)).all().item()):
            shown = shown + factor.masked_fill(hidden, 1).to(shown.dtype).log()
            product = replace(product, masked=True)
    return replace(record, logits=lambda: shown, product=product)


def exp_range(explicit: ExplicitSum) -> Tensor:
    """Return the share of the range of exp that each row uses, of size 1 along the keys.

    It is 1 where the largest exponential or their sum is the largest number of its format, or the
    sum the smallest: beyond it they are inf or 0, and the row is NaN. It is 0 for scores of 0, also
    in the sum, which then is the number of keys.
    """
    format_, sum_format = torch.finfo(explicit.dtype), torch.finfo(explicit.sum_dtype)
    lowest = math.log(format_.smallest_normal) + math.log(format_.eps)
    total, of_zeros = explicit.total, math.log(explicit.keys)
    shares = (
        explicit.largest / math.log(format_.max),
        (total - of_zeros) / max(1.0, math.log(sum_format.max) - of_zeros),
        (total / lowest).masked_fill(total.isneginf(), 0),
        torch.zeros_like(total),
    )
    return torch.stack(shares).amax(0)


def of_same_scores(a: ScoreProvenance, b: ScoreProvenance) -> bool:
    """Return whether two tensors hold the same scores, up to casts and views."""
    same = all(
        getattr(a, name) is getattr(b, name) for name in ("query", "key", "shift", "cells")
    ) and all(getattr(a, name) == getattr(b, name) for name in ("scale", "cap", "fills", "gated"))
    return same and a.query is not None


def narrower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the dtype of the smaller range.

    >>> narrower(torch.float32, torch.float16)
    torch.float16
    """
    return a if torch.finfo(a).max <= torch.finfo(b).max else b
