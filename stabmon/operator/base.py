"""Attention as a linear operator A = softmax(z) that is applied, never written out.

B batch, H query heads, H_kv key heads, Q queries, K keys, D head dimension. A *score* is
``z = scale * query @ key.T``, before a softcap; a *logit* is what the softmax sees, after softcap
and bias. Without a softcap the two are the same but for hidden keys.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from stabmon.operator.row_sums import LN_2
from stabmon.operator.visibility import Visibility

Statistic = Literal[
    "log_partition",
    "log_partition_2",
    "log_partition_3",
    "mean_score",
    "entropy",
    "collision",
    "jacobian_norm",
    "max_score",
    "min_score",
    "max_logit",
    "min_logit",
    "log_odds_of_rest",
    "first_key_mass",
]
"""What can be asked of each row; each is ``[B, H, Q]``. The same names are methods of the
operator.
"""
STATISTICS: frozenset[str] = frozenset(get_args(Statistic))


EMPTY_ROW: dict[str, float] = {
    "log_partition": -math.inf,
    "log_partition_2": -math.inf,
    "log_partition_3": -math.inf,
    "max_score": -math.inf,
    "max_logit": -math.inf,
    "min_score": math.inf,
    "min_logit": math.inf,
    "log_odds_of_rest": -math.inf,
}
"""What a statistic is for a row that sees no key, where that is not 0."""


@dataclass(frozen=True, eq=False)
class RowBlock:
    """The attention weights of some query rows; keys outside ``cols`` have none in any of them."""

    rows: slice
    cols: slice
    probabilities: Tensor
    """``[B, H, rows, cols]``, in [0, 1]; a row sums to 1, to less beside a learned sink, to 0 where
    it sees no key.
    """


class AttentionOperator(ABC):
    """The attention of every head of one call, ready to be asked.

    All results are float32 (float64 where the inputs or the engine are), on the inputs' device,
    without gradients. A row that sees no key has an empty softmax: see :data:`EMPTY_ROW`, never
    NaN. A row with a NaN or +inf score is NaN.

    A learned sink joins the softmax: it counts in ``log_partition``, ``mean_score`` and
        ``entropy``, and holds probability that no
    key has; it is no score, so the maxima and minima leave it out.
    """

    engine: str

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        visibility: Visibility,
        softcap: float | None,
        sinks: Tensor | None,
        given_scores: Tensor | None = None,
    ) -> None:
        self.query = query
        self.key = key
        self.scale = scale
        self.visibility = visibility
        self.softcap = softcap
        self.sinks = sinks
        self.given_scores = given_scores
        self.batch, self.heads, self.queries = query.shape[:3]
        self.key_heads, self.keys, self.head_dim = key.shape[1:]
        self._known: dict[str, Tensor] = {}

    def prepare(self, statistics: Iterable[str]) -> None:
        """Compute these statistics together, in as few passes as the engine can; later questions
        for them cost nothing.

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
            with torch.no_grad(), torch.autocast(self.query.device.type, enabled=False):
                self._known.update(self._compute(missing))

    def log_partition(self, power: int = 1) -> Tensor:
        """``[B, H, Q]`` L(a) = ln sum_j exp(a * logit_j), for the powers a = 1, 2, 3.

        Raises:
            ValueError: for another power.
        """
        if power not in (1, 2, 3):
            raise ValueError(f"power {power!r} of the log-partition: use 1, 2 or 3")
        return self._get("log_partition" if power == 1 else f"log_partition_{power}")

    def mean_score(self) -> Tensor:
        """``[B, H, Q]`` E_p[logit], the mean of a row's logits under its own softmax."""
        return self._get("mean_score")

    def entropy(self) -> Tensor:
        """``[B, H, Q]`` -sum p ln p = L(1) - E_p[logit] in nats, formed where an engine loses the
        least of it to cancellation.
        """
        return self._get("entropy")

    def collision(self) -> Tensor:
        """``[B, H, Q]`` sum p^2 = exp(L(2) - 2 L(1)), formed where an engine loses the least of it
        to cancellation.
        """
        return self._get("collision")

    def jacobian_norm(self) -> Tensor:
        """``[B, H, Q]`` Frobenius norm of diag(p) - p p^T, the root of sum p^2 - 2 sum p^3 + (sum
        p^2)^2, without its cancellation.
        """
        return self._get("jacobian_norm")

    def max_score(self) -> Tensor:
        """``[B, H, Q]`` the largest visible score, before any softcap; exact with every engine."""
        return self._get("max_score")

    def min_score(self) -> Tensor:
        """``[B, H, Q]`` the smallest visible score, before any softcap; exact with every engine."""
        return self._get("min_score")

    def max_logit(self) -> Tensor:
        """``[B, H, Q]`` the largest visible logit, after softcap and bias."""
        return self._get("max_logit")

    def min_logit(self) -> Tensor:
        """``[B, H, Q]`` the smallest visible logit, after softcap and bias."""
        return self._get("min_logit")

    def log_odds_of_rest(self) -> Tensor:
        """``[B, H, Q]`` ln r = ln sum over all but the largest key of exp(logit - largest); -inf
        where nothing else is visible.

        In float32 -inf also where it is below about -100.
        """
        return self._get("log_odds_of_rest")

    def first_key_mass(self) -> Tensor:
        """``[B, H, Q]`` probability on the first key that the mask lets any query of the head see
        (key 0 unless padded on the left).
        """
        return self._get("first_key_mass")

    def n_visible(self) -> Tensor:
        """``[B, H, Q]`` int64: how many keys each row sees (a learned sink not counted)."""
        return self.visibility.n_visible.expand(self.batch, self.heads, self.queries)

    @cached_property
    def occupied(self) -> Tensor:
        """``[B, H, Q]`` bool: the row sees at least one key."""
        return self.n_visible() > 0

    @cached_property
    def is_counted(self) -> Tensor:
        """``[B, H, Q]`` bool: the row sees a key and is not known to be padding."""
        padding = self.visibility.is_padding
        return self.occupied if padding is None else self.occupied & ~padding

    def matvec(self, x: Tensor) -> Tensor:
        """A x: ``x`` is ``[B or 1, H or H_kv or 1, K, C]``, the result ``[B, H, Q, C]``.

        Raises:
            ValueError: for values of another shape.
        """
        with torch.no_grad(), torch.autocast(self.query.device.type, enabled=False):
            return self._matvec(self._per_query_head(x))

    def rmatvec(self, y: Tensor) -> Tensor:
        """A^T y: ``y`` is ``[B or 1, H or 1, Q, C]``, the result ``[B, H, K, C]``, one for each
        *query* head.

        Raises:
            ValueError: for values of another shape.
        """
        with torch.no_grad(), torch.autocast(self.query.device.type, enabled=False):
            return self._rmatvec(self._per_query_row(y))

    def row_blocks(self, elements: int = 1 << 20, *, reverse: bool = False) -> Iterator[RowBlock]:
        """Yield the attention weights of all query rows, a few rows at a time.

        Every row lies in exactly one block. Memory is linear in the number of keys.

        Args:
            elements: weights in one block, over batch, heads, rows and keys; at least one row is
                taken.
            reverse: begin with the last rows.

        Example:
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
        """Return the keys that some query rows may see, and the attention weights of the rows over
        them.

        Args:
            rows: query rows, with start and stop.
            samples: batch elements.
            heads: query heads.

        Returns:
            The keys as a slice, which may be empty, and the weights ``[b, h, rows, keys]`` in [0,
            1], float32 (float64 where the inputs or the engine are). A row with a NaN or +inf logit
            is NaN.
        """
        rows, samples, heads = (
            slice(*s.indices(n)[:2])
            for s, n in ((rows, self.queries), (samples, self.batch), (heads, self.heads))
        )
        cols = (
            slice(*self.visibility.key_range(rows.start, rows.stop))
            if rows.start < rows.stop
            else slice(0, 0)
        )
        with torch.no_grad(), torch.autocast(self.query.device.type, enabled=False):
            logits = self._logits_of(rows, cols, samples, heads)
            if self.sinks is not None:
                sinks = self.sinks_of_rows()[samples, heads, rows].to(logits.dtype)
                logits = torch.cat([logits, sinks[..., None]], dim=-1)
            if logits.shape[-1] == 0:
                return cols, logits
            top = logits.amax(-1, keepdim=True)
            shifted = logits.sub_(top.masked_fill(top.isneginf(), 0.0))
            weights = (
                shifted.mul_(1 / LN_2).exp2_()
            )  # on a CPU exp takes 10 to 20 times as long where it underflows, exp2 does not
            weights /= weights.sum(-1, keepdim=True).masked_fill_(top.isneginf(), 1.0)
            return cols, weights if self.sinks is None else weights[..., :-1]

    def _logits_of(self, rows: slice, cols: slice, samples: slice, heads: slice) -> Tensor:
        """What the softmax of some rows sees, ``[b, h, rows, cols]``, hidden keys at -inf; a tensor
        of its own.
        """
        if self.given_scores is not None:
            logits = self.given_scores[samples, heads, rows, cols].to(self._dtype, copy=True)
        else:
            groups = self.heads // self.key_heads
            first, last = heads.start // groups, -(-heads.stop // groups)
            query, key = (
                self.query[samples, heads, rows].to(self._dtype),
                self.key[samples, first:last, cols].to(self._dtype),
            )
            if groups > 1 and (heads.start % groups or heads.stop % groups):
                of_head = torch.arange(heads.start, heads.stop, device=key.device) // groups - first
                logits = query @ key[:, of_head].mT
            else:
                folded = query.unflatten(1, (last - first, -1)).flatten(2, 3)
                logits = (folded @ key.mT).unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        see = self.visibility.of(samples, heads)
        for side in self.visibility.sides(rows, cols):
            hidden, bias = see.block(rows, side)
            part = logits[..., side.start - cols.start : side.stop - cols.start]
            if bias is not None:
                part += bias
            if hidden is not None:
                part.masked_fill_(hidden, -math.inf)
        return logits

    @cached_property
    def query_squared(self) -> Tensor:
        """``[B, H, Q]`` squared norm of each query."""
        query = self.query.to(self._dtype)
        return (query * query).sum(-1)

    @cached_property
    def key_gram(self) -> Tensor:
        """``[B, H_kv, D, D]`` K^T K of each key head, over the keys that some query sees."""
        key, seen = self.key.to(self._dtype), self.visibility.seen_keys
        if seen is not None:
            by_head = seen if seen.shape[1] == 1 else seen.unflatten(1, (self.key_heads, -1)).any(2)
            key = key.masked_fill(~by_head[..., None], 0.0)
        return key.mT @ key

    @property
    def _dtype(self) -> torch.dtype:
        """What this engine computes in."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def sinks_of_rows(self) -> Tensor:
        """``[B, H, Q]`` the sinks of each row."""
        assert self.sinks is not None
        sinks = self.sinks if self.sinks.dim() > 1 else self.sinks.view(1, -1, 1)
        return sinks.expand(self.batch, self.heads, self.queries)

    def sinks_at(self, index: Tensor) -> Tensor | None:
        """The sinks of the query rows ``index``, as they are given."""
        return (
            self.sinks if self.sinks is None or self.sinks.dim() == 1 else self.sinks[:, :, index]
        )

    @abstractmethod
    def rows(self, index: Tensor) -> AttentionOperator:
        """The operator of the query rows ``index`` (int64, ascending) only."""

    @abstractmethod
    def _matvec(self, x: Tensor) -> Tensor:
        """A x for ``x`` of ``[B, H, K, C]``."""

    @abstractmethod
    def _rmatvec(self, y: Tensor) -> Tensor:
        """A^T y for ``y`` of ``[B, H, Q, C]``."""

    @abstractmethod
    def _compute(self, statistics: set[str]) -> dict[str, Tensor]:
        """These statistics, and any that came for free."""

    def _get(self, name: str) -> Tensor:
        if name not in self._known:
            self.prepare([name])
        return self._known[name]

    def _per_query_head(self, x: Tensor) -> Tensor:
        """``[B, H, K, C]`` from values given for every query head, key head, or once."""
        if (
            x.dim() != 4
            or x.shape[2] != self.keys
            or x.shape[1] not in (1, self.key_heads, self.heads)
        ):
            raise ValueError(
                f"values of shape {tuple(x.shape)}: give [B, H or H_kv or 1, K, C] with "
                f"H={self.heads}, "
                f"H_kv={self.key_heads}, K={self.keys}"
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


def check_inputs(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Say in one line what is wrong with the inputs of an operator, if anything is.

    Raises:
        ValueError: naming the value and the mend.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: give [B, H, Q, D] and [B, "
            "H_kv, K, D]"
        )
    if not query.is_floating_point() or not key.is_floating_point():
        raise ValueError(
            f"query is {query.dtype} and key is {key.dtype}: give floating-point tensors"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head "
            "dimension: make these equal"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: nothing to attend in an "
            "empty batch, give data"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads over {key.shape[1]} key heads: the first must be a "
            "multiple of the second"
        )
    if query.device != key.device:
        raise ValueError(
            f"query is on {query.device} and key on {key.device}: move both to one device"
        )
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(
            f"scale {scale!r}: give a finite number other than 0, usually head_dim ** -0.5"
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window!r}: give at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap!r}: give a positive number, or None for none")
    if sinks is not None and sinks.shape not in ((query.shape[1],), query.shape[:3]):
        raise ValueError(
            f"sinks of shape {tuple(sinks.shape)}: give one logit a query head, "
            f"[{query.shape[1]}], or a row, {list(query.shape[:3])}"
        )
    if mask is not None:
        wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"mask is {mask.dtype}: give bool (True is visible) or an additive float mask"
            )
        try:
            fits = torch.broadcast_shapes(mask.shape, wanted) == torch.Size(wanted)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to [B, H, Q, K] = "
                f"{list(wanted)}: reshape it"
            )
