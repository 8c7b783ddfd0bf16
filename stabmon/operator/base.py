"""Attention as a linear operator A = softmax(z), applied and never written out.

B batch, H query heads, H_kv key heads, Q queries, K keys, D head dimension. A *score* is
``z = scale * query @ key.T``, before a softcap; a *logit* is the argument of the softmax, after
softcap and bias. Without a softcap the two are the same but for hidden keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Self

from torch import Tensor

from stabmon.operator.computing import computing_on
from stabmon.operator.inputs import AttentionInputs
from stabmon.operator.row_weights import RowBlock, probabilities_of
from stabmon.operator.statistics import STATISTICS


class AttentionOperator(AttentionInputs, ABC):
    """The attention of every head of one call as a linear operator.

    All results are float32 (float64 where the inputs or the engine are), on the inputs' device,
    without gradients. A row that sees no key has an empty softmax, never NaN: see
    :data:`~stabmon.operator.statistics.EMPTY_ROW`. A row with a NaN or +inf score is NaN.

    A learned sink joins the softmax: it counts in ``log_partition``, ``mean_score`` and
    ``entropy``, and holds probability that no key has. It is no score, so the maxima and minima
    leave it out.

    Arguments as for :class:`~stabmon.operator.inputs.AttentionInputs`; make one with
    :func:`stabmon.operator.attention_operator`.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.zeros(1, 1, 3, 4)
        >>> attention = attention_operator(query, query, scale=0.5, is_causal=True)
        >>> attention.log_partition().exp()
        tensor([[[1., 2., 3.]]])
    """

    engine: str

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        """The statistics computed so far."""
        return {}

    def prepare(self, statistics: Iterable[str]) -> None:
        """Compute statistics together, in as few passes as the engine can.

        Asking for one of them later costs nothing.

        Args:
            statistics: names of :data:`~stabmon.operator.STATISTICS`.

        Raises:
            ValueError: for a name that is none of :data:`Statistic`.
        """
        wanted = set(statistics)
        if unknown := wanted - STATISTICS:
            raise ValueError(
                f"unknown statistic {sorted(unknown)[0]!r}. Known: {', '.join(sorted(STATISTICS))}"
            )
        missing = wanted - self._known.keys()
        if missing:
            with computing_on(self.query.device):
                self._known.update(self._compute(missing))

    def log_partition(self, power: int = 1) -> Tensor:
        """Return L(a) = ln sum_j exp(a * logit_j) for the powers a = 1, 2, 3.

        Returns:
            ``[B, H, Q]``.

        Raises:
            ValueError: for another power.
        """
        if power not in (1, 2, 3):
            raise ValueError(f"power {power!r} of the log-partition: use 1, 2 or 3")
        return self._get("log_partition" if power == 1 else f"log_partition_{power}")

    def mean_score(self) -> Tensor:
        """Return E_p[logit], a row's mean logit under its own softmax, ``[B, H, Q]``."""
        return self._get("mean_score")

    def entropy(self) -> Tensor:
        """Return -sum p ln p = L(1) - E_p[logit] in nats, ``[B, H, Q]``.

        Formed where an engine loses the least of it to cancellation.
        """
        return self._get("entropy")

    def collision(self) -> Tensor:
        """Return sum p^2 = exp(L(2) - 2 L(1)), ``[B, H, Q]``.

        Formed where an engine loses the least of it to cancellation.
        """
        return self._get("collision")

    def jacobian_norm(self) -> Tensor:
        """Return the Frobenius norm of diag(p) - p p^T, ``[B, H, Q]``.

        The root of sum p^2 - 2 sum p^3 + (sum p^2)^2, without its cancellation.
        """
        return self._get("jacobian_norm")

    def max_score(self) -> Tensor:
        """Return the largest visible score, before any softcap, ``[B, H, Q]``.

        Exact with every engine.
        """
        return self._get("max_score")

    def min_score(self) -> Tensor:
        """Return the smallest visible score, before any softcap, ``[B, H, Q]``.

        Exact with every engine.
        """
        return self._get("min_score")

    def max_logit(self) -> Tensor:
        """Return the largest visible logit, after softcap and bias, ``[B, H, Q]``."""
        return self._get("max_logit")

    def min_logit(self) -> Tensor:
        """Return the smallest visible logit, after softcap and bias, ``[B, H, Q]``."""
        return self._get("min_logit")

    def log_odds_of_rest(self) -> Tensor:
        """Return ``[B, H, Q]`` ln of the sum of exp(logit - largest) over all other keys.

        -inf where nothing else is visible, and in float32 also where it is below about -100.
        """
        return self._get("log_odds_of_rest")

    def first_key_mass(self) -> Tensor:
        """Return the probability on the first key of the sequence, ``[B, H, Q]``.

        The first key that the mask lets any query of the head see: key 0 unless padded on the left.
        """
        return self._get("first_key_mass")

    def matvec(self, x: Tensor) -> Tensor:
        """Return A x.

        Args:
            x: ``[B or 1, H or H_kv or 1, K, C]``.

        Returns:
            ``[B, H, Q, C]``.

        Raises:
            ValueError: for values of another shape.
        """
        with computing_on(self.query.device):
            return self._matvec(self._per_query_head(x))

    def rmatvec(self, y: Tensor) -> Tensor:
        """Return A^T y.

        Args:
            y: ``[B or 1, H or 1, Q, C]``.

        Returns:
            ``[B, H, K, C]``, one for each *query* head.

        Raises:
            ValueError: for values of another shape.
        """
        with computing_on(self.query.device):
            return self._rmatvec(self._per_query_row(y))

    def row_blocks(self, elements: int = 1 << 20, *, reverse: bool = False) -> Iterator[RowBlock]:
        """Yield the attention weights of all query rows, a few rows at a time.

        Every row lies in exactly one block. Memory is linear in the number of keys.

        Args:
            elements: weights in one block, over batch, heads, rows and keys; at least one row is
                taken.
            reverse: begin with the last rows.

        Example:
            >>> import torch
            >>> from stabmon.operator import attention_operator
            >>> query = torch.randn(1, 2, 6, 4)
            >>> attention = attention_operator(query, query, scale=0.5, is_causal=True)
            >>> [tuple(block.probabilities.shape) for block in attention.row_blocks(elements=24)]
            [(1, 2, 2, 2), (1, 2, 2, 4), (1, 2, 2, 6)]
        """
        step = max(1, elements // max(1, self.batch * self.heads * self.keys))
        starts = range(0, self.queries, step)
        for start in reversed(starts) if reverse else starts:
            rows = slice(start, min(start + step, self.queries))
            yield RowBlock(rows, *self.probabilities_of(rows))

    def probabilities_of(
        self, rows: slice, samples: slice = slice(None), heads: slice = slice(None)
    ) -> tuple[slice, Tensor]:
        """Return the attention weights of some query rows over the keys they may see.

        Args:
            rows: query rows, with start and stop.
            samples: batch elements.
            heads: query heads.

        Returns:
            The keys as a slice, which may be empty, and the weights ``[b, h, rows, keys]`` in [0,
            1], float32 (float64 where the inputs or the engine are). A row with a NaN or +inf logit
            is NaN.
        """
        return probabilities_of(self, rows, samples, heads)

    def rows(self, index: Tensor) -> Self:
        """Return the operator of the query rows ``index`` (int64, ascending) only."""
        chosen = type(self)(
            self.query[:, :, index],
            self.key,
            self.scale,
            self.visibility.select(index),
            self.softcap,
            self.sinks_at(index),
            None if self.given_scores is None else self.given_scores[:, :, index],
        )
        chosen.exp_range = None if self.exp_range is None else self.exp_range[:, :, index]
        return chosen

    @abstractmethod
    def _matvec(self, x: Tensor) -> Tensor:
        """Return A x for ``x`` of ``[B, H, K, C]``."""

    @abstractmethod
    def _rmatvec(self, y: Tensor) -> Tensor:
        """Return A^T y for ``y`` of ``[B, H, Q, C]``."""

    @abstractmethod
    def _compute(self, statistics: set[str]) -> dict[str, Tensor]:
        """Return these statistics, and any that came for free."""

    def _get(self, name: str) -> Tensor:
        if name not in self._known:
            self.prepare([name])
        return self._known[name]

    def _per_query_head(self, x: Tensor) -> Tensor:
        """Return values given per query head, per key head or once as ``[B, H, K, C]``."""
        if (
            x.dim() != 4
            or x.shape[2] != self.keys
            or x.shape[1] not in (1, self.key_heads, self.heads)
        ):
            raise ValueError(
                f"values of shape {tuple(x.shape)}: give [B, H or H_kv or 1, K, C] with "
                f"H={self.heads}, H_kv={self.key_heads}, K={self.keys}"
            )
        if x.shape[1] == self.key_heads != self.heads:
            x = x.repeat_interleave(self.heads // self.key_heads, dim=1)
        return x.expand(self.batch, self.heads, -1, -1)

    def _per_query_row(self, y: Tensor) -> Tensor:
        if y.dim() != 4 or y.shape[2] != self.queries or y.shape[1] not in (1, self.heads):
            raise ValueError(
                f"values of shape {tuple(y.shape)}: give [B, H or 1, Q, C] with H={self.heads}, "
                f"Q={self.queries}"
            )
        return y.expand(self.batch, self.heads, -1, -1)
