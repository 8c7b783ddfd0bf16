"""Attention in a graph of operations: a softmax of a product, used as weights.

Scores are followed back, and weights forward, through every operation that neither multiplies two
tensors nor has parameters of its own, so through joining, splitting, slicing, padding and copying
as well. A classifier, a router, a gate or a loss is none: the scores of the first three are
products with parameters, and a loss weighs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "parameter",
    "tensor",
    "product",
    "parametric",
    "softmax",
    "exponential",
    "normaliser",
    "fused",
    "mul",
    "sum",
    "other",
]


@dataclass(eq=False)
class Op:
    """One operation, or a tensor of unknown origin.

    Attributes:
        kind: ``product`` multiplies its inputs, ``parametric`` has parameters of its own (a norm,
            an embedding), a ``fused`` kernel is attention by itself, a ``normaliser`` divides or
            takes a logsumexp, ``other`` is all the rest.
        name: the operation as torch or its author calls it.
        inputs: the operations that made its operands.
        numel: numbers in its result; 0 where unknown.
        ndim: dimensions of its result; 0 where unknown.
        seen: whether an adapter has recorded an attention call while it ran.
        span: the sequence numbers that autograd had given out before and after it.
        module: the module that called it, where that was looked for.
    """

    kind: Kind
    name: str = ""
    inputs: tuple[Op, ...] = ()
    numel: int = 0
    ndim: int = 0
    seen: bool = False
    span: tuple[int, int] = (0, 0)
    module: object = None
    fixed: bool = field(init=False)
    """True for a parameter, cut or changed elementwise. A row looked up in one, or a product
    with one, is not: learned queries attend.
    """

    def __post_init__(self) -> None:
        of_parameters = bool(self.inputs) and all(each.fixed for each in self.inputs)
        self.fixed = self.kind == "parameter" or (
            of_parameters and self.kind not in ("parametric", "product")
        )

    @property
    def multiplies(self) -> bool:
        """True for a product of two tensors, neither made of parameters alone."""
        if self.kind == "product":
            return sum(not each.fixed for each in self.inputs) > 1
        factors = self.inputs[0] if self.kind == "sum" and self.inputs else None
        return (
            factors is not None
            and factors.kind == "mul"
            and sum(not each.fixed for each in factors.inputs) == 2
        )

    @property
    def words(self) -> str:
        """Description of the attention that it is."""
        if self.kind == "fused":
            return f"kernel {self.name}"
        return (
            "hand-written softmax of a product"
            if self.kind == "exponential"
            else "softmax of a product"
        )

    @property
    def is_passed(self) -> bool:
        """True if scores stay scores, and weights weights, through it."""
        return (
            self.kind in ("mul", "sum", "normaliser", "other", "exponential")
            and not self.multiplies
        )


@dataclass(frozen=True, eq=False)
class Site:
    """One place at which a graph attends."""

    op: Op
    """The softmax, or the fused kernel."""
    around: tuple[Op, ...] = ()
    """The products before and after it, and what lies between it and the latter."""

    @property
    def seen(self) -> bool:
        """True if an adapter has recorded it."""
        return self.op.seen or any(each.seen for each in self.around)


def find_attention(ops: Iterable[Op]) -> Iterator[Site]:
    """Yield every place at which a graph of operations, given in any order, attends."""
    ops = list(ops)
    users: dict[Op, list[Op]] = defaultdict(list)
    for op in ops:
        for each in op.inputs:
            users[each].append(op)
    for op in ops:
        if op.kind == "fused":
            yield Site(op)
        elif op.kind in ("softmax", "exponential") and op.ndim != 1:
            before, normalised = _products_before(op)
            if not before:
                continue
            after, between = _products_after(op, users)
            normalised = normalised or any(each.kind == "normaliser" for each in between)
            if after and (op.kind == "softmax" or normalised):
                yield Site(op, (*before, *after, *between))


def _products_before(softmax: Op) -> tuple[list[Op], bool]:
    """Return the products under a softmax, and whether a logsumexp lay in between."""
    found, normalised, waiting, known = [], False, list(softmax.inputs), set()
    while waiting:
        op = waiting.pop()
        if op in known:
            continue
        known.add(op)
        if op.multiplies:
            found.append(op)
        elif op.is_passed:
            normalised = normalised or op.name == "logsumexp"
            waiting += op.inputs
    return found, normalised


def _products_after(softmax: Op, users: dict[Op, list[Op]]) -> tuple[list[Op], list[Op]]:
    """Return the products in which a softmax is used, and the operations in between."""
    found: list[Op] = []
    between: list[Op] = []
    waiting, known = [softmax], {softmax}
    while waiting:
        op = waiting.pop()
        for user in users[op]:
            if user in known:
                continue
            known.add(user)
            if user.kind == "product" and user.multiplies:
                found.append(user)
            elif (
                user.kind == "mul"
                and user.numel > op.numel
                and any(each.multiplies and each.ndim > 1 for each in users[user])
            ):
                # weights broadcast over values, then summed; a loss multiplies like by like
                found.append(user)
            elif user.is_passed:
                between.append(user)
                waiting.append(user)
    return found, between
