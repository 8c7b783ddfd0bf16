"""Rows of parameters, and proposals that they make queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stabmon._torch.ranks.shards import local_rows
from stabmon._torch.tensors import is_sharded, local
from stabmon.projections.not_applicable import NotApplicable


@dataclass(frozen=True, eq=False)
class Rows:
    """Entries of a parameter along one dimension: ``[start, stop)`` of ``dim``."""

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int
    offset: float = 0.0
    """Offset of the value in use, ``offset + value``.

    1 for a norm whose gain is stored as its distance from one.
    """

    @property
    def key(self) -> tuple[int, int, tuple[int, ...]]:
        """Value that is equal for the same rows of the same parameter."""
        return id(self.parameter), self.dim, (self.start, self.stop)

    def view(self, tensor: Tensor) -> Tensor:
        """Return a view of the rows; of a sharded tensor, of those that are here.

        Args:
            tensor: the parameter, or a copy of its shape.

        Raises:
            NotApplicable: if the shard here is no unbroken range.
        """
        if not is_sharded(tensor):
            return tensor.narrow(self.dim, self.start, self.stop - self.start)
        rows = local_rows(tensor, self.dim, self.start, self.stop)
        if rows is None:
            raise NotApplicable(
                "the parameter is sharded in a way in which its rows cannot be told apart"
            )
        return local(tensor.detach()).narrow(self.dim, rows.start, rows.stop - rows.start)


@dataclass(frozen=True, eq=False)
class QueryKey:
    """Proposal of the rows that make the queries and keys of each head.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.zeros(4, 8))
        >>> found = QueryKey("q_proj alone", [[Rows(weight, 0, 0, 2)], [Rows(weight, 0, 2, 4)]])
        >>> [(rows.start, factor) for rows, factor in found.edits({1: 0.5})]
        [(2, 0.5)]
    """

    how: str
    """Description in words, for the record."""
    query: Sequence[Sequence[Rows]]
    """For each query head, rows that all of its scores are proportional to."""
    key: Sequence[Sequence[Rows]] | None = None
    """The same on the key side, where each query head has its own key head.

    None where scaling queries alone is exact.
    """
    shared: bool = False
    """True if the query rows are those of all heads, as a norm's gain that they share."""
    others: Sequence[Rows] = ()
    """Further rows that make queries and keys."""

    def edits(self, factors: Mapping[int, float]) -> list[tuple[Rows, float]]:
        """Return the rows to multiply, and their factors, for given factors of scores.

        Queries and keys take the square root each where both belong to the head alone. Under a gain
        shared by all heads the smallest factor is applied to all.

        Args:
            factors: factor of the scores of each head to be changed.
        """
        if self.shared:
            return [(rows, min(factors.values())) for rows in self.query[0]]
        edits: dict[tuple[int, int, tuple[int, ...]], tuple[Rows, float]] = {}
        for head, factor in factors.items():
            sides = [*self.query[head], *(self.key[head] if self.key is not None else ())]
            each = factor if self.key is None else factor**0.5
            # one entry where queries and keys share a projection
            edits.update({rows.key: (rows, each) for rows in sides})
        return list(edits.values())

    def all_rows(self) -> list[Rows]:
        """Return everything that makes queries and keys, each entry once."""
        key = self.key if self.key is not None else ()
        rows = [each for side in (self.query, key) for head in side for each in head]
        return list({each.key: each for each in [*rows, *self.others]}.values())
