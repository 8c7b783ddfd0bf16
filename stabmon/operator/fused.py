"""Statistics from the output and logsumexp of the fused kernel.

Scores never leave the kernel: with the keys as values, one call gives the log-partition and the
mean score. Exact where scores are plain ``scale * q.k`` under hiding masks; a pairwise bias, a
softcap or a learned sink goes to the blockwise engine, and so do maxima and the odds of the rest,
which no logsumexp resolves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stabmon.operator.blockwise import BlockwiseAttention
from stabmon.operator.kernels import Kernel, proven_kernel

_CALLS = (
    "log_partition",
    "log_partition_2",
    "log_partition_3",
    "mean_score",
    "entropy",
    "collision",
    "first_key_mass",
)
_MASKED_ROWS = 256
"""Rows per call with a mask, so that the part of the mask in memory is linear in K."""


class FusedAttention(BlockwiseAttention):
    """The fused kernel where it is exact, blockwise where it is not."""

    engine = "fused"

    @functools.cached_property
    def is_exact(self) -> bool:
        """True where scores are plain, so that the kernel sees the model's own logits."""
        plain = (
            self.softcap is None
            and self.sinks is None
            and self.given_scores is None
            and not self.visibility.is_bias
        )
        return plain and self.query.dtype != torch.float64 and self.keys > 0

    @functools.cached_property
    def _kernel(self) -> Kernel | None:
        return proven_kernel(self.query.device, self.head_dim) if self.is_exact else None

    def _compute(self, statistics: set[str]) -> dict[str, Tensor]:
        # with any other statistic, the pass that this needs gives all of them
        if statistics <= set(_CALLS) and self._kernel is not None:
            out = self._from_kernel(self._kernel, statistics)
            bad = torch.stack([rows.isnan().any() for rows in out.values()])
            if not bool(bad.any()):
                return out
            self._kernel = None  # it may have let a NaN or inf spread to rows that do not see it
        return super()._compute(statistics)

    def _from_kernel(self, kernel: Kernel, mine: set[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if mine & {"log_partition", "mean_score", "entropy", "collision", "first_key_mass"}:
            means, out["log_partition"] = self._call(kernel, 1, self.key)
            out["mean_score"] = self.scale * means.mul_(self.query).sum(-1)
            out["entropy"] = torch.where(
                self.occupied, (out["log_partition"] - out["mean_score"]).clamp(min=0), 0.0
            )
        for power in (2, 3):
            if f"log_partition_{power}" in mine | (
                {"log_partition_2"} if "collision" in mine else set()
            ):
                half = self.query.dtype in (torch.float16, torch.bfloat16)
                lse_kernel = (
                    proven_kernel(self.query.device, self.head_dim, self.query.dtype)
                    if half
                    else None
                ) or kernel
                out[f"log_partition_{power}"] = self._call(lse_kernel, power, self.key)[1]
        if "collision" in mine:
            logarithm = out["log_partition_2"] - 2 * out["log_partition"]
            out["collision"] = torch.where(self.occupied, logarithm, -math.inf).exp()
        if "first_key_mass" in mine:
            logarithm = self._first_scores() - out["log_partition"]
            out["first_key_mass"] = torch.where(
                self.occupied & self.visibility.sees_first, logarithm, -math.inf
            ).exp()
        return out

    def _first_scores(self) -> Tensor:
        """Return the score of each row with the first key, visible or not, ``[B, H, Q]``."""
        device, first = self.query.device, self.visibility.first_visible
        batch, heads = (
            torch.arange(self.batch, device=device)[:, None],
            torch.arange(self.heads, device=device),
        )
        key = self.key[
            batch, heads // (self.heads // self.key_heads), 0 if first is None else first
        ]
        scores: Tensor = self.scale * (self.query.float() @ key.float()[..., None])[..., 0]
        return scores

    def _matvec(self, x: Tensor) -> Tensor:
        kernel = self._kernel
        if kernel is None:
            return super()._matvec(x)
        x, columns = x.float(), x.shape[-1]
        parts = []
        for start in range(0, columns, self.head_dim):
            part = x[..., start : start + self.head_dim]
            padded = torch.nn.functional.pad(part, (0, self.head_dim - part.shape[-1]))
            parts.append(self._call(kernel, 1, padded)[0][..., : part.shape[-1]])
        out = torch.cat(parts, dim=-1)
        if bool(out.isnan().any()) and not bool(x.isnan().any()):
            self._kernel = None
            return super()._matvec(x)
        return out

    def _call(self, kernel: Kernel, power: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return A values ``[B, H, Q, D]`` and L(power) ``[B, H, Q]``.

        Empty rows are 0 and -inf.
        """
        rooms: tuple[Tensor, Tensor] | None = None
        key = self.key if values.shape[1] == self.key_heads else self._per_query_head(self.key)
        for rows, cols, mask, causal in self._spans():
            q, k, v = (
                _contiguous_rows(x.to(kernel.dtype))
                for x in (self.query[:, :, rows], key[:, :, cols], values[:, :, cols])
            )
            q = q if self.scale > 0 else -q  # a negative scale would turn the mask's -inf round
            part, part_lse = kernel.run(q, k, v, mask, causal, power * abs(self.scale))
            if part.shape[2] == self.queries:
                rooms = part, part_lse
                break
            rooms = rooms or self._rooms(values.shape[-1])
            rooms[0][:, :, rows], rooms[1][:, :, rows] = part, part_lse
        out, lse = rooms or self._rooms(values.shape[-1])
        empty = ~self.occupied
        return out.masked_fill_(empty[..., None], 0.0), lse.masked_fill_(empty, -math.inf)

    def _rooms(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return buffers for the results of several calls, filled as for empty rows."""
        shape, device = self.query.shape[:3], self.query.device
        return torch.zeros(*shape, columns, device=device), torch.full(
            shape, -math.inf, device=device
        )

    def _spans(self) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
        """Yield the kernel's calls as (rows, keys, additive mask, causal).

        One call where the kernel's own causality will do.
        """
        see = self.visibility
        whole = slice(0, self.queries), slice(0, self.keys)
        if see.everything or (
            see.is_causal
            and self.queries == 1
            and see.window is None
            and see.mask is None
            and not see.offset < 0
        ):
            yield (*whole, None, False)
            return
        if (
            see.is_causal
            and see.window is None
            and see.mask is None
            and see.offset == 0
            and see.positions is None
        ):
            yield (*whole, None, True)
            return
        for start in range(0, self.queries, _MASKED_ROWS):
            rows = slice(start, min(start + _MASKED_ROWS, self.queries))
            low, high = see.key_range(rows.start, rows.stop)
            if low < high:
                hidden, _ = see.block(rows, slice(low, high))
                yield rows, slice(low, high), None if hidden is None else _additive(hidden), False


def _contiguous_rows(x: Tensor) -> Tensor:
    """Return ``x`` with stride 1 in the last dimension, which kernels rely on."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(hidden: Tensor) -> Tensor:
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)
    return mask if mask.dim() == 4 else mask[None, None]
