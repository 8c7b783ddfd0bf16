"""Every row statistic in one pass over small blocks of scores.

Exact for any mask, bias, softcap or sink, on any device. A row longer than a block is folded block
by block, rescaled to the largest logit so far, so that memory is linear in Q and K. Logits are held
in bits (multiples of ln 2): on a CPU ``exp`` takes up to a hundred times as long where it
underflows, ``exp2`` does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from stabmon.operator.base import AttentionOperator
from stabmon.operator.logit_blocks import LogitBlock, LogitBlocks
from stabmon.operator.row_sums import LN_2, LOWEST, PARTS, RowSums, finish, fold, sums_of_no_key
from stabmon.operator.statistics import EMPTY_ROW
from stabmon.operator.visibility.pieces import HIDDEN

_LEAST = 2.0**-42
"""Probability relative to the row's largest below which it is raised to this value.

Its square and cube are lost in the sums, and denormal ones would be slow.
"""
_SATURATED = 1.01
"""Sum of exp(logit - max) below which ``sum - 1`` has lost digits of the rest.

The rest is then summed without the maximum.
"""


class BlockwiseAttention(AttentionOperator):
    """Row blocks by key blocks, rescaled online, float32 (float64 for float64 inputs)."""

    engine = "blockwise"

    @cached_property
    def _with_care(self) -> bool:
        """True to keep apart infinities and NaN.

        On a CPU only once something was found to be: it takes twice as long.
        """
        return self.query.device.type != "cpu"

    def _compute(self, statistics: set[str]) -> dict[str, Tensor]:
        parts = {part for name in statistics for part in PARTS[name]} | {"top"}
        if self.softcap is None:
            parts = {part.removeprefix("raw_") for part in parts}
        sums = self._pass(parts)
        if not self._with_care and any(
            bool(sums[part].isnan().any()) for part in parts & {"top", "weighted"}
        ):
            self._with_care = True
            sums = self._pass(parts)
        sinks = None if self.sinks is None else self.sinks_of_rows().to(self.compute_dtype)
        rows = finish(sums, sinks, statistics)
        return {
            name: torch.where(self.occupied, row, EMPTY_ROW.get(name, 0.0))
            for name, row in rows.items()
        }

    def _pass(self, parts: set[str]) -> RowSums:
        """Return the ``parts`` of every row, ``[B, H, Q]``."""
        names = sorted(parts)
        sums = sums_of_no_key(names, self.query.shape[:3], self.compute_dtype, self.query.device)
        so_far: Tensor | None = None
        for block in LogitBlocks(self, self._with_care).of(parts):
            found = self._sums(block, parts)
            part = torch.stack([found[name] for name in names])
            if so_far is not None:
                both = fold(
                    dict(zip(names, so_far, strict=True)), dict(zip(names, part, strict=True))
                )
                part = torch.stack([both[name] for name in names])
            so_far = part
            if block.is_last:
                batch, heads, rows = block.where
                sums[:, batch, heads, rows] = part.flatten(2, 3)
                so_far = None
        return dict(zip(names, sums, strict=True))

    def _sums(self, block: LogitBlock, parts: set[str]) -> RowSums:
        """Return the sums of one block; destroys its logits."""
        if block.logits.device.type != "cpu":
            return self._sums_without_reading(block, parts)
        z, p = block.logits, block.spare
        top = z.amax(-1)
        sums = {"top": top, **block.extremes}
        if "rest" not in parts:
            return sums
        z.sub_(top.clamp(min=HIDDEN / 10)[..., None])
        if self._with_care:
            z.clamp_(min=LOWEST)
        torch.exp2(z, out=p)
        total = p.sum(-1)
        if "weighted" in parts:
            sums["weighted"] = z.mul_(p).sum(-1)
        if "first" in parts:
            sums["first"] = self._first_of(p, block).clone()
        sums["rest"], largest = total - 1, torch.ones_like(total)
        if total.amin().item() < _SATURATED:
            saturated = (total < _SATURATED) & (total > 0.5)
            sums["rest"] = torch.where(saturated, torch.frac(p, out=z).sum(-1), sums["rest"])
            largest.masked_fill_(saturated, 0.0)
            if "square_rest" in parts:
                torch.where(saturated[..., None], z, p, out=p)
        if "square_rest" in parts:
            p.clamp_(min=_LEAST)
            sums["square_rest"] = torch.mul(p, p, out=z).sum(-1) - largest
            if "cube_rest" in parts:
                sums["cube_rest"] = z.mul_(p).sum(-1) - largest
        return sums

    def _sums_without_reading(self, block: LogitBlock, parts: set[str]) -> RowSums:
        """Return the sums of one block in few passes over memory; destroys its logits.

        For devices that the host would have to wait for. Keys at the maximum, where e is exactly 1,
        are counted and left out of the sums, so that ``sum - 1`` never loses digits of the rest.
        """
        top = block.logits.amax(-1)
        sums = {"top": top, **block.extremes}
        if "rest" not in parts:
            return sums
        e = block.logits.sub_(top.clamp(min=HIDDEN / 10)[..., None]).exp2_()
        total = e.sum(-1)
        if "weighted" in parts:
            # e * log2(e), 0 where e is: 0 * -inf does not come up
            sums["weighted"] = torch.special.entr(e, out=block.spare).sum(-1) / -LN_2
        if "first" in parts:
            sums["first"] = self._first_of(e, block).clone()
        below = e.frac_().sum(-1)
        others = (total - below).round() - 1
        sums["rest"] = below + others
        for part, power in (("square_rest", 2), ("cube_rest", 3)):
            if part in parts:
                sums[part] = torch.linalg.vector_norm(e, power, dim=-1) ** power + others
        return sums

    def _first_of(self, p: Tensor, block: LogitBlock) -> Tensor:
        """Return p of the first key where it lies in this block, else 0."""
        first = self.visibility.first_visible
        if first is None:
            return p[..., 0] if block.cols.start == 0 else torch.zeros_like(p[..., 0])
        batch, heads, _ = block.where
        index = (
            first.expand(self.batch, self.heads)[batch, heads].reshape(p.shape[:3])[..., None, None]
            - block.cols.start
        )
        inside = (index >= 0) & (index < p.shape[-1])
        value = p.gather(-1, index.clamp(0, p.shape[-1] - 1).expand(*p.shape[:-1], 1))
        return torch.where(inside, value, 0.0)[..., 0]

    def _matvec(self, x: Tensor) -> Tensor:
        x = x.to(self.compute_dtype)
        out = torch.zeros(
            self.batch,
            self.heads,
            self.queries,
            x.shape[-1],
            dtype=self.compute_dtype,
            device=x.device,
        )
        for block, p in self._probabilities():
            batch, heads, _ = block.where
            out[block.where] += p @ x[batch, heads, block.cols]
        return out

    def _rmatvec(self, y: Tensor) -> Tensor:
        y = y.to(self.compute_dtype)
        out = torch.zeros(
            self.batch,
            self.heads,
            self.keys,
            y.shape[-1],
            dtype=self.compute_dtype,
            device=y.device,
        )
        for block, p in self._probabilities():
            batch, heads, _ = block.where
            out[batch, heads, block.cols] += p.mT @ y[block.where]
        return out

    def _probabilities(self) -> Iterator[tuple[LogitBlock, Tensor]]:
        """Yield each block with its probabilities, ``[b, heads, rows, cols]``."""
        log_partition = self.log_partition()
        for block in LogitBlocks(self, self._with_care).of(set()):
            p = block.logits.flatten(1, 2)
            shift = log_partition[block.where][..., None].to(p.dtype) / LN_2
            yield block, p.sub_(shift.masked_fill(shift.isneginf(), 0.0)).exp2_()
