"""Every row statistic in one pass over small blocks of scores: exact for any mask, bias, softcap or
sink, on any device.

Rows are taken a few at a time and keys trimmed to those that these rows can see. A row longer than
a block is folded block by block, rescaled to the largest logit so far, so that memory is linear in
Q and K. All arithmetic is in place in two buffers: on a CPU a block stays in the core's cache.
Logits are held in bits (multiples of ln 2): on a CPU ``exp`` takes up to a hundred times as long
where it underflows, ``exp2`` does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabmon.operator.base import EMPTY_ROW, AttentionOperator
from stabmon.operator.row_sums import LN_2, LOWEST, PARTS, RowSums, finish, fold, nothing
from stabmon.operator.visibility import HIDDEN, Piece

_BLOCK_ELEMENTS = 1 << 18
"""Scores in one block, a thread: two float32 blocks of this size fit a core's second-level
cache.
"""
_GPU_BLOCKS = 64
"""Blocks of that size at a time on other devices, which want fewer and larger calls."""
_MIN_KEYS = 2048
_MIN_ROWS, _MAX_ROWS = 32, 64
_KEYS_A_ROW = 32
"""A block has a row for so many keys: few rows waste less above the diagonal, many multiply
faster.
"""
_ROWS_FOR_COPY = 4
"""Query rows for each head dimension from which products are faster enough with the keys' transpose
copied to pay for the copy.
"""
_LEAST = 2.0**-42
"""Probability, relative to the row's largest, below which squares and cubes are lost in the sums;
denormal ones would be slow.
"""
_SATURATED = 1.01
"""Below this sum of exp(logit - max), ``sum - 1`` has lost digits of the rest, which is then summed
without the maximum.
"""


@dataclass(frozen=True)
class _Block:
    """Logits of some rows and keys: ``logits`` is ``[b, h, G, rows, cols]`` for b batch elements
    and h key heads of G query heads.
    """

    where: tuple[slice, slice, slice]
    """Batch elements, query heads and query rows."""
    cols: slice
    logits: Tensor
    spare: Tensor
    """Room of the same shape."""
    extremes: RowSums
    """``bottom`` of each row, and where there is a softcap ``raw_top`` and ``raw_bottom``, as far
    as they were asked for.
    """
    is_last: bool
    """No further keys come for these rows."""


class BlockwiseAttention(AttentionOperator):
    """Row blocks by key blocks, online rescale, float32 (float64 for float64 inputs)."""

    engine = "blockwise"

    @cached_property
    def _with_care(self) -> bool:
        """Whether to keep apart what is infinite or NaN. On a CPU only once something was found to
        be: it takes twice as long.
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
        sinks = None if self.sinks is None else self.sinks_of_rows().to(self._dtype)
        rows = finish(sums, sinks, statistics)
        return {
            name: torch.where(self.occupied, row, EMPTY_ROW.get(name, 0.0))
            for name, row in rows.items()
        }

    def _pass(self, parts: set[str]) -> RowSums:
        """The ``parts`` of every row, ``[B, H, Q]``."""
        names = sorted(parts)
        sums = nothing(names, self.query.shape[:3], self._dtype, self.query.device)
        so_far: Tensor | None = None
        for block in self._blocks(parts):
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

    def _sums(self, block: _Block, parts: set[str]) -> RowSums:
        """Sums of one block; destroys its logits."""
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
        if z.device.type != "cpu" or total.amin().item() < _SATURATED:
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

    def _first_of(self, p: Tensor, block: _Block) -> Tensor:
        """p of the first key where it lies in this block, else 0."""
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
        x = x.to(self._dtype)
        out = torch.zeros(
            self.batch, self.heads, self.queries, x.shape[-1], dtype=self._dtype, device=x.device
        )
        for block, p in self._probabilities():
            batch, heads, _ = block.where
            out[block.where] += p @ x[batch, heads, block.cols]
        return out

    def _rmatvec(self, y: Tensor) -> Tensor:
        y = y.to(self._dtype)
        out = torch.zeros(
            self.batch, self.heads, self.keys, y.shape[-1], dtype=self._dtype, device=y.device
        )
        for block, p in self._probabilities():
            batch, heads, _ = block.where
            out[batch, heads, block.cols] += p.mT @ y[block.where]
        return out

    def rows(self, index: Tensor) -> BlockwiseAttention:
        scores = None if self.given_scores is None else self.given_scores[:, :, index]
        visibility = self.visibility.select(index)
        return type(self)(
            self.query[:, :, index],
            self.key,
            self.scale,
            visibility,
            self.softcap,
            self.sinks_at(index),
            scores,
        )

    def _probabilities(self) -> Iterator[tuple[_Block, Tensor]]:
        """Each block with its probabilities, ``[b, heads, rows, cols]``."""
        log_partition = self.log_partition()
        for block in self._blocks(set()):
            p = block.logits.flatten(1, 2)
            shift = log_partition[block.where][..., None].to(p.dtype) / LN_2
            yield block, p.sub_(shift.masked_fill(shift.isneginf(), 0.0)).exp2_()

    def _blocks(self, parts: set[str]) -> Iterator[_Block]:
        """Every block of logits that holds a visible key; rows that see nothing get none. A block
        lives until the next is asked for.
        """
        groups = self.heads // self.key_heads
        query = self.query.unflatten(1, (self.key_heads, groups))
        keys = self.key.to(self._dtype).contiguous().mT
        if self.queries > _ROWS_FOR_COPY * self.head_dim:
            keys = keys.contiguous()
        scale = self.scale if self.softcap is not None else self.scale / LN_2
        budget = _BLOCK_ELEMENTS * (
            torch.get_num_threads() if self.query.device.type == "cpu" else _GPU_BLOCKS
        )
        n_rows = max(1, min(_MAX_ROWS, max(_MIN_ROWS, self.keys // _KEYS_A_ROW)) // groups)
        width = min(self.keys, max(_MIN_KEYS, budget // (groups * n_rows)))
        n_rows = min(
            self.queries, max(n_rows, min(_MAX_ROWS, budget // (self.batch * self.heads * width)))
        )
        room = torch.empty(
            2, max(budget, groups * n_rows * width), dtype=self._dtype, device=self.query.device
        ).unbind()
        for start in range(0, self.queries, n_rows):
            rows = slice(start, min(start + n_rows, self.queries))
            m = rows.stop - start
            low, high = self.visibility.key_range(start, rows.stop)
            shared: dict[int, list[Piece]] = {}
            for batch, key_heads in self._tiles(
                max(1, budget // (groups * n_rows * max(1, min(high - low, width))))
            ):
                b, h = batch.stop - batch.start, key_heads.stop - key_heads.start
                heads = slice(key_heads.start * groups, key_heads.stop * groups)
                q = query[batch, key_heads, :, rows].to(self._dtype).reshape(b * h, groups * m, -1)
                for left in range(low, high, width):
                    cols = slice(left, min(left + width, high))
                    n = cols.stop - left
                    z, spare = (
                        buffer[: b * h * groups * m * n].view(b, h, groups, m, n) for buffer in room
                    )
                    if self.given_scores is None:
                        flat = z.view(b * h, groups * m, n)
                        torch.baddbmm(
                            flat,
                            q,
                            keys[batch, key_heads, :, cols].flatten(0, 1),
                            beta=0,
                            alpha=scale,
                            out=flat,
                        )
                    else:
                        z.copy_(
                            self.given_scores[batch, heads, rows, cols].unflatten(1, (h, groups))
                        )
                        z.mul_(scale)
                    if not self.visibility.is_shared:
                        found = self.visibility.pieces(rows, cols, batch, heads)
                    elif left not in shared:
                        found = shared[left] = self.visibility.pieces(rows, cols)
                    else:
                        found = shared[left]
                    pieces = [self._five(piece, left) for piece in found]
                    extremes = self._to_logits(z, spare, pieces, parts)
                    yield _Block((batch, heads, rows), cols, z, spare, extremes, cols.stop == high)

    def _tiles(self, pairs: int) -> Iterator[tuple[slice, slice]]:
        """(batch elements, key heads) by about ``pairs`` of them at a time."""
        batch_step, head_step = max(1, pairs // self.key_heads), min(pairs, self.key_heads)
        for b in range(0, self.batch, batch_step):
            for h in range(0, self.key_heads, head_step):
                yield (
                    slice(b, min(b + batch_step, self.batch)),
                    slice(h, min(h + head_step, self.key_heads)),
                )

    def _five(self, piece: Piece, left: int) -> Piece:
        """Lay out a piece of mask, ``[b or 1, h * G or 1, rows, cols]`` or ``[rows, cols]``, as
        ``[b, h, G, rows, cols]``.
        """
        groups = self.heads // self.key_heads

        def part(x: Tensor | None) -> Tensor | None:
            if x is None or x.dim() == 2:
                return x
            return x.unflatten(1, (-1, groups)) if x.shape[1] > 1 else x[:, :, None]

        cols = slice(piece.cols.start - left, piece.cols.stop - left)
        return Piece(cols, part(piece.ceiling), part(piece.floor), part(piece.bias))

    def _to_logits(self, z: Tensor, spare: Tensor, pieces: list[Piece], parts: set[str]) -> RowSums:
        """Turn scores (with a softcap, in nats) into logits in place; returns each row's extremes
        but for the largest logit.
        """
        found: RowSums = {}
        if self.softcap is not None:
            if parts & {"raw_top", "raw_bottom"}:
                raw = torch.div(z, LN_2, out=spare)
                self._add_bias(raw, pieces)
                found["raw_bottom"] = self._smallest(raw, pieces)
                self._hide(raw, pieces)
                found["raw_top"] = raw.amax(-1)
            z.div_(self.softcap).tanh_().mul_(self.softcap / LN_2)
        self._add_bias(z, pieces)
        if "bottom" in parts:
            found["bottom"] = self._smallest(z, pieces)
        self._hide(z, pieces)
        return found

    def _add_bias(self, z: Tensor, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.bias is not None:
                z[..., piece.cols] += piece.bias / LN_2

    def _smallest(self, z: Tensor, pieces: list[Piece]) -> Tensor:
        """Smallest visible logit of each row; lifts what is hidden above all others."""
        for piece in pieces:
            part = z[..., piece.cols]
            if piece.ceiling is None or piece.floor is None:
                continue
            if self._with_care:
                part.masked_fill_(piece.ceiling < 0, -HIDDEN)
            else:
                torch.maximum(part, piece.floor, out=part)
        return z.amin(-1)

    def _hide(self, z: Tensor, pieces: list[Piece]) -> None:
        for piece in pieces:
            part = z[..., piece.cols]
            if piece.ceiling is None:
                continue
            if self._with_care:
                part.masked_fill_(piece.ceiling < 0, HIDDEN)
            else:
                torch.minimum(part, piece.ceiling, out=part)
