"""Mixing of one layer's attention with the residual path, in blocks of query rows."""

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
"""Attention weights in one block of rows, 1 MB in float32.

A block and its copies then stay in a core's cache.
"""
WIDE_ROWS = 64
"""Largest number of rows of a widened block."""

Observer = Callable[[Tensor, slice], None]
"""Receiver of the weights ``[H, rows, cols]`` of each block, and its rows."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Some rows of a layer's mixing matrix.

    The matrix is ``(residual * I + (1 - residual) * A) / row sum``, A fused over the heads. A row
    of A without visible keys is 0, so that its row of the mixture is the identity's.
    """

    rows: slice
    cols: slice
    attended: Tensor
    """Share of each attended token, ``[rows, cols]``."""
    kept: Tensor
    """Share of the row's own token, ``[rows, 1]``."""


class SampleMaps:
    """The attention maps of one sample in one layer.

    Args:
        queries, keys, heads: Q, K and H.
        weights: function from a slice of query rows to their visible keys and their weights
            ``[H, rows, cols]``.
        ends: function from the bounds of a slice of query rows to the end of their visible keys.
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
        """Allow blocks of up to ``WIDE_ROWS`` rows, with at most ``elements`` weights.

        A product with a wide state reads all of the state once per block.
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
        observer: Observer | None = None,
        only: Callable[[slice], bool] | None = None,
    ) -> Iterator[Mixture]:
        """Yield the mixing matrix from the last rows to the first.

        Args:
            fusion: fusion of the heads.
            residual: weight of the residual path, in [0, 1).
            observer: receives the weights of each block.
            only: function from a slice of rows to whether they are needed.
        """
        for start, stop in reversed(self._bounds()):
            rows = slice(start, stop)
            if only is not None and not only(rows):
                continue
            cols, weights = self._weights(rows)
            if observer is not None:
                observer(weights, rows)
            yield mix(rows, cols, fuse(weights, fusion), residual)

    def _bounds(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + self.step, self.queries))
            for start in range(0, self.queries, self.step)
        ]


def fuse(weights: Tensor, fusion: HeadFusion) -> Tensor:
    """Fuse the heads of ``[H, rows, cols]`` to ``[rows, cols]``.

    Args:
        weights: ``[H, rows, cols]``.
        fusion: ``mean``, ``max`` or ``min``.
    """
    if fusion == "mean":
        return weights.mean(0)
    return weights.amax(0) if fusion == "max" else weights.amin(0)


def mix(rows: slice, cols: slice, fused: Tensor, residual: float) -> Mixture:
    """Compute ``residual * I + (1 - residual) * fused``, each row divided by its sum.

    Args:
        rows, cols: query rows and key columns of the block.
        fused: ``[rows, cols]`` weights.
        residual: weight of the residual path, in [0, 1).
    """
    total = fused.sum(-1, keepdim=True).mul_(1 - residual).add_(residual)
    empty = total == 0
    attended = fused.mul_(1 - residual).div_(total.masked_fill(empty, 1.0))
    kept = torch.where(empty, 1.0, residual / total)
    return Mixture(rows, cols, attended, kept)


def sample_of(call: AttentionCall, index: int) -> AttentionCall:
    """Return one sample of a call, with results independent of the samples beside it.

    Args:
        call: the call of a batch.
        index: the sample.
    """
    one = slice(index, index + 1)

    def part(tensor: Tensor | None) -> Tensor | None:
        return (
            tensor[one] if tensor is not None and tensor.dim() == 4 and len(tensor) > 1 else tensor
        )

    def copy(tensor: Tensor | None) -> Tensor | None:
        """Return a fresh tensor.

        Products round differently by strides and by the alignment of a sample in memory.
        """
        return None if tensor is None else tensor[one].clone(memory_format=torch.contiguous_format)

    sinks = call.sinks[one] if call.sinks is not None and call.sinks.dim() > 1 else call.sinks
    query, key, scores = copy(call.query), copy(call.key), part(call.scores)
    return replace(call, query=query, key=key, mask=part(call.mask), scores=scores, sinks=sinks)


def maps_of(
    operator: AttentionOperator, weights: Callable[[slice], tuple[slice, Tensor]] | None = None
) -> SampleMaps:
    """Return the maps of an operator of one sample.

    Args:
        operator: the operator.
        weights: see :class:`SampleMaps`; None for the operator's own probabilities.
    """

    def probabilities(rows: slice) -> tuple[slice, Tensor]:
        cols, found = operator.probabilities_of(rows)
        return cols, found[0]

    def ends(start: int, stop: int) -> int:
        return operator.visibility.key_range(start, stop)[1]

    return SampleMaps(
        operator.queries, operator.keys, operator.heads, weights or probabilities, ends
    )


def call_maps(call: AttentionCall, index: int) -> tuple[SampleMaps, Tensor]:
    """Return the maps of one sample of a call, and its valid rows ``[Q]`` bool.

    A valid row sees a key and is no padding.

    Args:
        call: the call of a batch.
        index: the sample.
    """
    operator = operator_of(sample_of(call, index))
    return maps_of(operator), operator.is_counted[0].any(0)
