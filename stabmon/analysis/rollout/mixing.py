"""Mix one layer's attention with the residual path, a few query rows of one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall

HeadFusion = Literal["mean", "max", "min"]
FUSIONS: frozenset[str] = frozenset(get_args(HeadFusion))
BLOCK_ELEMENTS = 1 << 18
"""Attention weights in one block of rows: 1 MB in float32, so that a block and its copies stay in a
core's cache.
"""
WIDE_ROWS = 64

Look = Callable[[Tensor, slice], None]
"""Receives every block of weights ``[H, rows, cols]`` before its heads are fused, and its rows."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Some rows of a layer's mixing matrix ``(residual * I + (1 - residual) * A) / row sum``, A
    fused over the heads.

    A row of A that sees nothing is 0, so that its row of the mixture is the identity's.
    """

    rows: slice
    cols: slice
    attended: Tensor
    """``[rows, cols]``: the share that comes of each attended token."""
    kept: Tensor
    """``[rows, 1]``: the share that stays with the row's own token."""


class SampleMaps:
    """The attention maps of one sample in one layer.

    Args:
        queries, keys: Q and K.
        weights: gives for a slice of query rows the keys that they see and their weights ``[H,
            rows, cols]``.
        ends: gives for a slice of query rows the end of the keys that they may see.
    """

    def __init__(
        self,
        queries: int,
        keys: int,
        heads: int,
        weights: Callable[[slice], tuple[slice, Tensor]],
        ends: Callable[[int, int], int],
    ) -> None:
        self.queries, self.keys, self.heads = queries, keys, heads
        self._weights, self._ends = weights, ends
        self.step = max(1, min(queries, BLOCK_ELEMENTS // max(1, heads * keys)))

    def widen(self, elements: int) -> None:
        """Let a block have up to ``WIDE_ROWS`` rows where it holds no more than ``elements``
        weights.

        A product with a wide state reads all of the state once a block.
        """
        self.step = min(
            self.queries, max(self.step, min(WIDE_ROWS, elements // (self.heads * self.keys)))
        )

    @property
    def is_causal(self) -> bool:
        """Return whether no block of rows sees keys beyond its last row."""
        return self.keys == self.queries and all(self._ends(a, b) <= b for a, b in self._bounds())

    def mixtures(
        self,
        fusion: HeadFusion,
        residual: float,
        *,
        look: Look | None = None,
        only: Callable[[slice], bool] | None = None,
    ) -> Iterator[Mixture]:
        """Yield the mixing matrix from the last rows to the first.

        Args:
            fusion: how heads become one.
            residual: weight of the residual path, in [0, 1).
            look: is shown the weights of each block.
            only: says for a slice of rows whether they are wanted.
        """
        for start, stop in reversed(self._bounds()):
            rows = slice(start, stop)
            if only is not None and not only(rows):
                continue
            cols, weights = self._weights(rows)
            if look is not None:
                look(weights, rows)
            yield mix(rows, cols, fuse(weights, fusion), residual)

    def _bounds(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + self.step, self.queries))
            for start in range(0, self.queries, self.step)
        ]


def fuse(weights: Tensor, fusion: HeadFusion) -> Tensor:
    """Return ``[rows, cols]`` of ``[H, rows, cols]``."""
    if fusion == "mean":
        return weights.mean(0)
    return weights.amax(0) if fusion == "max" else weights.amin(0)


def mix(rows: slice, cols: slice, fused: Tensor, residual: float) -> Mixture:
    """Return ``residual * I + (1 - residual) * fused``, each row divided by its sum."""
    total = fused.sum(-1, keepdim=True).mul_(1 - residual).add_(residual)
    empty = total == 0
    attended = fused.mul_(1 - residual).div_(total.masked_fill(empty, 1.0))
    kept = torch.where(empty, 1.0, residual / total)
    return Mixture(rows, cols, attended, kept)


def sample_of(call: AttentionCall, index: int) -> AttentionCall:
    """Return the call of one sample alone: what is computed of it then does not depend on the
    samples beside it.
    """
    one = slice(index, index + 1)

    def part(tensor: Tensor | None) -> Tensor | None:
        return (
            tensor[one] if tensor is not None and tensor.dim() == 4 and len(tensor) > 1 else tensor
        )

    def copy(tensor: Tensor | None) -> Tensor | None:
        """A fresh tensor: products round otherwise by strides and by where in memory a sample
        begins.
        """
        return None if tensor is None else tensor[one].clone(memory_format=torch.contiguous_format)

    sinks = call.sinks[one] if call.sinks is not None and call.sinks.dim() > 1 else call.sinks
    query, key, scores = copy(call.query), copy(call.key), part(call.scores)
    return replace(call, query=query, key=key, mask=part(call.mask), scores=scores, sinks=sinks)


def maps_of(operator: AttentionOperator) -> SampleMaps:
    """Return the maps of an operator of one sample."""

    def weights(rows: slice) -> tuple[slice, Tensor]:
        cols, found = operator.probabilities_of(rows)
        return cols, found[0]

    def ends(start: int, stop: int) -> int:
        return operator.visibility.key_range(start, stop)[1]

    return SampleMaps(operator.queries, operator.keys, operator.heads, weights, ends)


def call_maps(call: AttentionCall, index: int) -> tuple[SampleMaps, Tensor]:
    """Return the maps of one sample of a call, and ``[Q]`` bool: the rows that see a key and are
    not padding.
    """
    operator = operator_of(sample_of(call, index))
    return maps_of(operator), operator.is_counted[0].any(0)
