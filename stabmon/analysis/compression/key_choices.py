"""Choices of some keys for each query, as of a compressed KV cache.

A choice returns the keys of a block of query rows at a time. ``keep`` counts keys, the query's own
included; a query with no more visible keys keeps them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from stabmon.operator import AttentionOperator

SINKS = 4
"""Number of first keys of recency with sinks (Xiao et al. 2023, arXiv 2309.17453)."""


class KeyChoice(ABC):
    """Choice of the kept keys of each query."""

    keep: int

    def begin(self, attention: AttentionOperator) -> None:  # noqa: B027
        """Prepare for a layer before its rows are processed."""

    def ends(self, start: int) -> int | None:
        """Return the last possible end of a block from row ``start`` on; None for any."""
        return None

    @abstractmethod
    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        """Return the kept keys, broadcasting to ``[B, H, rows, K]``, bool.

        Args:
            rows: query rows.
            visible: ``[B or 1, H or 1, rows, K]`` bool.
            logits: ``[B, H, rows, K]``, hidden keys at -inf.
        """


class AllKeys(KeyChoice):
    """All keys: a full cache."""

    keep = 1 << 62

    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        return visible


@dataclass
class RecentKeys(KeyChoice):
    """The newest keys, and the first ``sinks`` of a sample."""

    keep: int
    sinks: int = 0

    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        rank = visible.cumsum(-1, dtype=torch.int32)
        newest = rank > rank[..., -1:] - (self.keep - self.sinks)
        return visible & (newest | (rank <= self.sinks))


@dataclass
class RandomKeys(KeyChoice):
    """The query's own key and others drawn anew for every row, alike in all heads."""

    keep: int
    seed: int = 0
    _generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self._generator.manual_seed(self.seed)

    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        draw = torch.rand(visible.shape[-2:], generator=self._generator).to(visible.device)
        rank = visible.cumsum(-1, dtype=torch.int32)
        draw = draw.masked_fill(rank == rank[..., -1:], 2.0).masked_fill(~visible, -1.0)
        return visible & _largest(draw, self.keep)


@dataclass
class TopKeys(KeyChoice):
    """The keys with the largest weights of each query and head.

    No cache knows these beforehand: they bound any choice by weight, and are the aim of kernels
    that select keys per query (Quest, arXiv 2406.10774).
    """

    keep: int

    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        return visible & _largest(logits, self.keep)


@dataclass
class DiverseKeys(KeyChoice):
    """The newest half, and of the older keys those least like their mean.

    The choice (KeyDiff, Park et al. 2025, arXiv 2504.15364) is per key head, and made anew every
    ``keep // 4`` queries from the keys that are then older than the newest half.
    """

    keep: int

    def begin(self, attention: AttentionOperator) -> None:
        key = attention.key.float()
        self._key = functional.normalize(key, dim=-1)
        seen = attention.visibility.seen_keys
        shape = attention.batch, attention.heads, attention.keys
        self._groups = attention.heads // attention.key_heads
        self._offset = attention.visibility.offset
        if seen is None:
            seen = torch.ones(1, 1, 1, dtype=torch.bool, device=key.device)
        self._seen = seen.expand(shape)[:, :: self._groups]

    def ends(self, start: int) -> int | None:
        interval = max(1, self.keep // 4)
        return start - start % interval + interval

    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        newest = self.keep - self.keep // 2
        rank = visible.cumsum(-1, dtype=torch.int32)
        recent = visible & (rank > rank[..., -1:] - newest)
        interval = max(1, self.keep // 4)
        now = rows.start - rows.start % interval + self._offset
        old = max(0, now + 1 - newest)
        chosen = torch.zeros(self._seen.shape, dtype=torch.bool, device=visible.device)
        if old:
            key, seen = self._key[:, :, :old], self._seen[:, :, :old]
            mean = (key * seen[..., None]).sum(2, keepdim=True)
            unlike = -functional.cosine_similarity(key, mean, dim=-1)
            unlike = unlike.masked_fill(~seen, -torch.inf)
            chosen[:, :, :old] = seen & _largest(unlike, self.keep // 2)
        chosen = chosen[..., : visible.shape[-1]]
        per_head = chosen.repeat_interleave(self._groups, dim=1)[:, :, None]
        count = rank[..., -1:]
        return recent | (visible & (per_head | (count <= self.keep)))


def _largest(values: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` largest entries of each row."""
    count = min(count, values.shape[-1])
    place = values.topk(count, dim=-1, sorted=False).indices
    return torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter(
        -1, place, True
    )


@dataclass
class GroupedKeys(KeyChoice):
    """Merged older neighbours: ``size`` keys become their mean key and mean value.

    The newest ``keep // 2`` keys stay single. A merged key counts as often as it has members (its
    logit gets the logarithm of their number).
    """

    keep: int
    size: int

    def kept(self, rows: slice, visible: Tensor, logits: Tensor) -> Tensor:
        """Return the single keys; see :meth:`merged` for the others."""
        groups = self.grouped(visible)
        single = ~groups.repeat_interleave(self.size, dim=-1)
        return visible & single[..., : visible.shape[-1]]

    def grouped(self, visible: Tensor) -> Tensor:
        """Return the merged groups of each row: whole, visible, and older than the newest.

        Args:
            visible: ``[…, rows, K]`` bool.

        Returns:
            ``[…, rows, ceil(K / size)]`` bool.
        """
        rank = visible.cumsum(-1, dtype=torch.int32)
        old = rank <= rank[..., -1:] - self.keep // 2
        few = rank[..., -1:] <= self.keep
        behind = old & ~(few & visible)
        missing = -visible.shape[-1] % self.size
        whole = functional.pad(behind, (0, missing)).unflatten(-1, (-1, self.size)).all(-1)
        some = functional.pad(visible, (0, missing)).unflatten(-1, (-1, self.size)).any(-1)
        result: Tensor = whole & some
        return result

    def merged(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the mean of each group over its visible members.

        Args:
            x: ``[B, H, K, D]``.
            seen: ``[B, H, K]`` bool, keys that are no padding.
        """
        missing = -x.shape[2] % self.size  # entries of padding at the end
        total = functional.pad(x * seen[..., None], (0, 0, 0, missing))
        mean: Tensor = (
            total.unflatten(2, (-1, self.size)).sum(3) / self.counts(seen).clamp(min=1)[..., None]
        )
        return mean

    def counts(self, seen: Tensor) -> Tensor:
        """Return the number of real members of each group, ``[B, H, groups]``."""
        missing = -seen.shape[-1] % self.size
        counts: Tensor = functional.pad(seen, (0, missing)).unflatten(-1, (-1, self.size)).sum(-1)
        return counts
