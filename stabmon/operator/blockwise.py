"""Every row statistic in one pass over small blocks of scores: exact for any mask, bias, softcap or sink, on any device.

Rows are taken a few at a time and keys trimmed to those that these rows can see. A row longer than a block is folded block by
block, rescaled to the largest logit so far, so that memory is linear in Q and K. All arithmetic is in place: on a CPU a block
stays in the core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon.operator.base import EMPTY_ROW, AttentionOperator

_BLOCK_ELEMENTS = 1 << 18
"""Scores in one block, a thread: two float32 blocks of this size fit a core's second-level cache."""
_MAX_KEYS = 1 << 14
_MIN_ROWS, _MAX_ROWS = 16, 64
_LOWEST = -1e4
"""Distance below the row's maximum at which exp is 0 in every format; keeps 0 * -inf out of the sums."""
_SATURATED = 1.01
"""Below this sum of exp(logit - max), ``sum - 1`` has lost digits of the rest, which is then summed without the maximum."""
_WITHOUT_EXP = frozenset({"max_score", "min_score", "max_logit", "min_logit"})


@dataclass(frozen=True)
class _Block:
    """Logits of some rows and keys: ``logits`` is ``[b, h, G, rows, cols]`` for b batch elements and h key heads of G query heads."""

    where: tuple[slice, slice]
    """Batch elements and query heads."""
    rows: slice
    cols: slice
    logits: Tensor
    extremes: dict[str, Tensor]


@dataclass
class _RowSums:
    """Sums over the keys of each row so far, relative to ``top``, its largest logit; an empty row has top -inf and rest -1."""

    top: Tensor
    rest: Tensor
    """Sum of exp(logit - top) over all but one largest key."""
    weighted: Tensor
    """Sum of exp(logit - top) * (logit - top)."""
    square: Tensor
    cube: Tensor
    first: Tensor
    """exp(logit - top) of the first key."""

    def fold(self, other: _RowSums) -> _RowSums:
        """The sums over the keys of both."""
        top = torch.maximum(self.top, other.top)
        shift, other_shift = self._shift(top), other._shift(top)
        factor, other_factor = shift.exp(), other_shift.exp()
        mass, other_mass = factor * (1 + self.rest), other_factor * (1 + other.rest)
        return _RowSums(
            top=top,
            rest=torch.where(self.top >= other.top, self.rest + other_mass, other.rest + mass),
            weighted=factor * self.weighted + shift * mass + other_factor * other.weighted + other_shift * other_mass,
            square=factor**2 * self.square + other_factor**2 * other.square,
            cube=factor**3 * self.cube + other_factor**3 * other.cube,
            first=factor * self.first + other_factor * other.first,
        )

    def _shift(self, top: Tensor) -> Tensor:
        """top of these keys below the common one; an equal top is 0 also where both are infinite."""
        return torch.where(self.top == top, 0.0, self.top - top).clamp(min=_LOWEST)

    @classmethod
    def of_sink(cls, sink: Tensor) -> _RowSums:
        """A learned sink as a key of its own."""
        zero, one = torch.zeros_like(sink), torch.ones_like(sink)
        return cls(sink, zero, zero, one, one, zero)


class BlockwiseAttention(AttentionOperator):
    """Row blocks by key blocks, online rescale, float32 (float64 for float64 inputs)."""

    engine = "blockwise"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def _compute(self, statistics: set[str]) -> dict[str, Tensor]:
        out = {name: self._empty(name) for name in statistics}
        needs_exp = bool(statistics - _WITHOUT_EXP)
        sums: _RowSums | None = None
        extremes: dict[str, Tensor] = {}
        for block, is_last in self._blocks(statistics & _WITHOUT_EXP):
            for name, value in block.extremes.items():
                known = extremes.get(name)
                better = torch.maximum if name.startswith("max") else torch.minimum
                extremes[name] = value if known is None else better(known, value)
            if needs_exp:
                part = self._sums(block, statistics)
                sums = part if sums is None else sums.fold(part)
            if is_last:
                results = dict(extremes) if sums is None else extremes | self._finish(sums, block, statistics)
                for name in statistics:
                    batch, heads = block.where
                    out[name][batch, heads, block.rows] = results[name].flatten(1, 2)
                sums, extremes = None, {}
        return out

    def _sums(self, block: _Block, statistics: set[str]) -> _RowSums:
        """Sums of one block; destroys its logits."""
        z = block.logits
        top = z.amax(-1)
        z.sub_(torch.where(top.isneginf(), 0.0, top)[..., None])
        if not self.visibility.everything or self.given_scores is not None:
            z.clamp_(min=_LOWEST)
        p = z.exp()
        total = p.sum(-1)
        rest = total - 1
        if "log_odds_of_rest" in statistics:
            lost = (total < _SATURATED) & (total > 0.5)
            if z.device.type != "cpu" or bool(lost.any()):
                at_top = z == 0
                rest = torch.where(lost, p.masked_fill(at_top, 0.0).sum(-1) + (at_top.sum(-1) - 1), rest)
        none = torch.zeros_like(top)
        first = self._first_of(p, block) if "first_key_mass" in statistics else none
        weighted = z.mul_(p).sum(-1) if statistics & {"entropy", "mean_score"} else none
        square = cube = none
        if statistics & {"log_partition_2", "log_partition_3"}:
            torch.mul(p, p, out=z)
            square = z.sum(-1)
        if "log_partition_3" in statistics:
            cube = z.mul_(p).sum(-1)
        return _RowSums(top, rest, weighted, square, cube, first)

    def _finish(self, sums: _RowSums, block: _Block, statistics: set[str]) -> dict[str, Tensor]:
        log_odds = sums.rest.log()
        if self.sinks is not None:
            groups = self.heads // self.key_heads
            sink = self.sinks[block.where[1]].to(sums.top).view(1, -1, groups, 1).expand_as(sums.top)
            log_odds = torch.logaddexp(log_odds, sink - sums.top)
            sums = sums.fold(_RowSums.of_sink(sink))
        log_total, total = sums.rest.log1p(), sums.rest + 1
        results = {
            "log_partition": sums.top + log_total,
            "log_partition_2": 2 * sums.top + sums.square.log(),
            "log_partition_3": 3 * sums.top + sums.cube.log(),
            "mean_score": sums.top + sums.weighted / total,
            "entropy": (log_total - sums.weighted / total).clamp(min=0),
            "log_odds_of_rest": log_odds,
            "first_key_mass": sums.first / total,
        }
        batch, heads = block.where
        seen = self.occupied[batch, heads, block.rows].view_as(sums.top)
        return {name: torch.where(seen, value, EMPTY_ROW.get(name, 0.0)) for name, value in results.items() if name in statistics}

    def _first_of(self, p: Tensor, block: _Block) -> Tensor:
        """p of the first key where it lies in this block, else 0."""
        first = self.visibility.first_visible
        if first is None:
            return p[..., 0] if block.cols.start == 0 else torch.zeros_like(p[..., 0])
        batch, heads = block.where
        index = first.expand(self.batch, self.heads)[batch, heads].view(p.shape[:3])[..., None, None] - block.cols.start
        inside = (index >= 0) & (index < p.shape[-1])
        value = p.gather(-1, index.clamp(0, p.shape[-1] - 1).expand(*p.shape[:-1], 1))
        return torch.where(inside, value, 0.0)[..., 0]

    def matvec(self, x: Tensor) -> Tensor:
        x = self._per_query_head(x).to(self._dtype)
        out = torch.zeros(self.batch, self.heads, self.queries, x.shape[-1], dtype=self._dtype, device=x.device)
        with torch.no_grad():
            for block, p in self._probabilities():
                batch, heads = block.where
                out[batch, heads, block.rows] += p @ x[batch, heads, block.cols]
        return out

    def rmatvec(self, y: Tensor) -> Tensor:
        y = self._per_query_row(y).to(self._dtype)
        out = torch.zeros(self.batch, self.heads, self.keys, y.shape[-1], dtype=self._dtype, device=y.device)
        with torch.no_grad():
            for block, p in self._probabilities():
                batch, heads = block.where
                out[batch, heads, block.cols] += p.mT @ y[batch, heads, block.rows]
        return out

    def rows(self, index: Tensor) -> BlockwiseAttention:
        scores = None if self.given_scores is None else self.given_scores[:, :, index]
        visibility = self.visibility.select(index)
        return type(self)(self.query[:, :, index], self.key, self.scale, visibility, self.softcap, self.sinks, scores)

    def _probabilities(self) -> Iterator[tuple[_Block, Tensor]]:
        """Each block with its probabilities, ``[b, heads, rows, cols]``."""
        log_partition = self.log_partition()
        for block, _ in self._blocks(set()):
            batch, heads = block.where
            p = block.logits.flatten(1, 2)
            shift = log_partition[batch, heads, block.rows, None].to(p.dtype)
            yield block, p.sub_(shift.masked_fill(shift.isneginf(), 0.0)).exp_()

    def _blocks(self, extremes: set[str]) -> Iterator[tuple[_Block, bool]]:
        """Every block of logits that holds a visible key, with whether it is the last of its rows; rows that see nothing get none."""
        groups = self.heads // self.key_heads
        budget = _BLOCK_ELEMENTS * (torch.get_num_threads() if self.query.device.type == "cpu" else 64)
        width = min(self.keys, _MAX_KEYS)
        if self.visibility.window is not None and self.visibility.is_causal:
            width = min(width, self.visibility.window + _MAX_ROWS)
        n_rows = min(self.queries, max(_MIN_ROWS, min(_MAX_ROWS, budget // (groups * width))))
        pairs = max(1, budget // (groups * n_rows * width))
        batch_step, head_step = max(1, pairs // self.key_heads), min(pairs, self.key_heads)
        query = self.query.unflatten(1, (self.key_heads, groups))
        for b in range(0, self.batch, batch_step):
            batch = slice(b, min(b + batch_step, self.batch))
            for h in range(0, self.key_heads, head_step):
                key_heads = slice(h, min(h + head_step, self.key_heads))
                heads = slice(h * groups, key_heads.stop * groups)
                key = self.key[batch, key_heads].to(self._dtype)
                for start in range(0, self.queries, n_rows):
                    rows = slice(start, min(start + n_rows, self.queries))
                    q = (query[batch, key_heads, :, rows].to(self._dtype) * self.scale).flatten(2, 3)
                    low, high = self.visibility.key_range(rows.start, rows.stop)
                    for left in range(low, high, _MAX_KEYS):
                        cols = slice(left, min(left + _MAX_KEYS, high))
                        if self.given_scores is None:
                            z = torch.matmul(q, key[:, :, cols].mT).unflatten(2, (groups, -1))
                        else:
                            z = self.given_scores[batch, heads, rows, cols].to(self._dtype, copy=True).unflatten(1, (-1, groups))
                        found = self._mask_and_cap(z, (batch, heads), rows, cols, extremes)
                        yield _Block((batch, heads), rows, cols, z, found), cols.stop == high

    def _mask_and_cap(
        self, z: Tensor, where: tuple[slice, slice], rows: slice, cols: slice, extremes: set[str]
    ) -> dict[str, Tensor]:
        """Turn raw scores into logits in place; returns the extremes asked for, before and after the softcap."""
        pieces = []
        for piece, hidden, bias in self.visibility.pieces(rows, cols):
            inside = slice(piece.start - cols.start, piece.stop - cols.start)
            pieces.append((inside, self._five(hidden, where, z.shape[2]), self._five(bias, where, z.shape[2])))
        found: dict[str, Tensor] = {}
        if self.softcap is not None:
            found = _extremes(z, pieces, extremes & {"max_score", "min_score"})
            z.div_(self.softcap).tanh_().mul_(self.softcap)
            extremes = extremes & {"max_logit", "min_logit"}
        for inside, _, bias in pieces:
            if bias is not None:
                z[..., inside] += bias
        pieces = [(inside, hidden, None) for inside, hidden, _ in pieces]
        found |= _extremes(z, pieces, extremes)
        for inside, hidden, _ in pieces:
            if hidden is not None:
                z[..., inside].masked_fill_(hidden, -math.inf)
        return found

    def _five(self, part: Tensor | None, where: tuple[slice, slice], groups: int) -> Tensor | None:
        """A piece of mask, ``[B or 1, H or 1, rows, cols]`` or ``[rows, cols]``, as ``[b, h, G, rows, cols]``."""
        if part is None or part.dim() == 2:
            return part
        batch, heads = where
        part = part[batch] if part.shape[0] > 1 else part
        return part[:, heads].unflatten(1, (-1, groups)) if part.shape[1] > 1 else part[:, :, None]

    def _empty(self, name: str) -> Tensor:
        return torch.full(self.query.shape[:3], EMPTY_ROW.get(name, 0.0), dtype=self._dtype, device=self.query.device)


def _extremes(z: Tensor, pieces: list[tuple[slice, Tensor | None, Tensor | None]], names: set[str]) -> dict[str, Tensor]:
    """Largest and smallest visible entry of each row, before ``pieces`` are hidden."""
    found: dict[str, Tensor] = {}
    for side in {name[:3] for name in names}:
        hide = -math.inf if side == "max" else math.inf
        parts, plain = [], [slice(0, z.shape[-1])]
        for inside, hidden, bias in pieces:
            part = z[..., inside] if bias is None else z[..., inside] + bias
            parts.append(part if hidden is None else part.masked_fill(hidden, hide))
            before = [slice(keep.start, min(keep.stop, inside.start)) for keep in plain]
            plain = before + [slice(max(keep.start, inside.stop), keep.stop) for keep in plain]
        parts += [z[..., keep] for keep in plain if keep.start < keep.stop]
        values = [part.amax(-1) if side == "max" else part.amin(-1) for part in parts if part.shape[-1]]
        best = values[0]
        for value in values[1:]:
            best = torch.maximum(best, value) if side == "max" else torch.minimum(best, value)
        found |= {name: best for name in names if name.startswith(side)}
    return found
