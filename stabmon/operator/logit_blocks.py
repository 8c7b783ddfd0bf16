"""Logits of one call in small blocks, as few as hold a visible key.

Rows are taken a few at a time and keys trimmed to those that these rows can see. All arithmetic is
in place in two buffers: on a CPU a block stays in the core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon.operator.inputs import AttentionInputs
from stabmon.operator.row_sums import LN_2, RowSums
from stabmon.operator.visibility.pieces import HIDDEN, Piece

_BLOCK_ELEMENTS = 1 << 18
"""Scores in one block per thread: two float32 blocks fit a core's second-level cache."""
_DEVICE_ELEMENTS = 1 << 24, 1 << 25
"""Fewest and most scores in one block on other devices, which need few and large calls."""
_SHARE_OF_MEMORY = 1 << 9
"""A CUDA device's memory over that of the two buffers."""
_DEVICE_ROWS = 128
"""Query rows in a block on other devices, or a quarter of the keys where these are more.

More rows in a block would waste more above the diagonal.
"""
_MIN_KEYS = 2048
_MIN_ROWS, _MAX_ROWS = 32, 64
_KEYS_A_ROW = 32
"""Keys per row of a block: few rows waste less above the diagonal, many multiply faster."""
_ROWS_FOR_COPY = 4
"""Query rows per head dimension from which a copy of the transposed keys pays for itself."""


@dataclass(frozen=True)
class LogitBlock:
    """Logits of some rows and keys, in bits (multiples of ln 2)."""

    where: tuple[slice, slice, slice]
    """Batch elements, query heads and query rows."""
    cols: slice
    logits: Tensor
    """``[b, h, G, rows, cols]`` for b batch elements and h key heads of G query heads."""
    spare: Tensor
    """A second buffer of the same shape."""
    extremes: RowSums
    """``bottom`` of each row, and with a softcap ``raw_top`` and ``raw_bottom``, if needed."""
    is_last: bool
    """No further keys come for these rows."""


class LogitBlocks:
    """The blocks of logits of one call.

    Args:
        inputs: the call.
        with_care: keep apart infinities and NaN, which takes twice as long on a CPU.
    """

    def __init__(self, inputs: AttentionInputs, with_care: bool) -> None:
        self._inputs = inputs
        self._with_care = with_care

    def of(self, parts: set[str]) -> Iterator[LogitBlock]:
        """Yield every block of logits with a visible key.

        Rows that see nothing are in none. A block is overwritten by the next.

        Args:
            parts: the row sums for which the extremes of each row are needed.
        """
        groups = self._inputs.heads // self._inputs.key_heads
        query = self._inputs.query.unflatten(1, (self._inputs.key_heads, groups))
        keys = self._inputs.key.to(self._inputs.compute_dtype).contiguous().mT
        on_cpu = self._inputs.query.device.type == "cpu"
        if on_cpu and self._inputs.queries > _ROWS_FOR_COPY * self._inputs.head_dim:
            keys = keys.contiguous()
        scale = (
            self._inputs.scale if self._inputs.softcap is not None else self._inputs.scale / LN_2
        )
        budget = _budget(self._inputs.query.device)
        if on_cpu:
            least = max(_MIN_ROWS, self._inputs.keys // _KEYS_A_ROW)
            least, most = max(1, min(_MAX_ROWS, least) // groups), _MAX_ROWS
        else:
            least = min(_DEVICE_ROWS, self._inputs.queries)
            most = max(_DEVICE_ROWS, self._inputs.keys // 4)
        width = min(self._inputs.keys, max(_MIN_KEYS, budget // (groups * least)))
        fitting = budget // (self._inputs.batch * self._inputs.heads * width)
        n_rows = min(self._inputs.queries, max(least, min(most, fitting)))
        whole = self._inputs.batch * self._inputs.heads * n_rows * width
        room = torch.empty(
            2,
            max(budget if on_cpu else min(budget, whole), groups * n_rows * width),
            dtype=self._inputs.compute_dtype,
            device=self._inputs.query.device,
        ).unbind()
        for start in range(0, self._inputs.queries, n_rows):
            rows = slice(start, min(start + n_rows, self._inputs.queries))
            m = rows.stop - start
            low, high = self._inputs.visibility.key_range(start, rows.stop)
            shared: dict[int, list[Piece]] = {}
            for batch, key_heads in self._tiles(
                max(1, budget // (groups * n_rows * max(1, min(high - low, width))))
            ):
                b, h = batch.stop - batch.start, key_heads.stop - key_heads.start
                heads = slice(key_heads.start * groups, key_heads.stop * groups)
                q = (
                    query[batch, key_heads, :, rows]
                    .to(self._inputs.compute_dtype)
                    .reshape(b * h, groups * m, -1)
                )
                for left in range(low, high, width):
                    cols = slice(left, min(left + width, high))
                    n = cols.stop - left
                    z, spare = (
                        buffer[: b * h * groups * m * n].view(b, h, groups, m, n) for buffer in room
                    )
                    if self._inputs.given_scores is None:
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
                            self._inputs.given_scores[batch, heads, rows, cols].unflatten(
                                1, (h, groups)
                            )
                        )
                        z.mul_(scale)
                    if not self._inputs.visibility.is_shared:
                        found = self._inputs.visibility.pieces(rows, cols, batch, heads)
                    elif left not in shared:
                        found = shared[left] = self._inputs.visibility.pieces(rows, cols)
                    else:
                        found = shared[left]
                    pieces = [self._five_dimensional(piece, left) for piece in found]
                    extremes = self._to_logits(z, spare, pieces, parts)
                    yield LogitBlock(
                        (batch, heads, rows), cols, z, spare, extremes, cols.stop == high
                    )

    def _tiles(self, pairs: int) -> Iterator[tuple[slice, slice]]:
        """Yield (batch elements, key heads), about ``pairs`` of them at a time."""
        batch_step, head_step = (
            max(1, pairs // self._inputs.key_heads),
            min(pairs, self._inputs.key_heads),
        )
        for b in range(0, self._inputs.batch, batch_step):
            for h in range(0, self._inputs.key_heads, head_step):
                yield (
                    slice(b, min(b + batch_step, self._inputs.batch)),
                    slice(h, min(h + head_step, self._inputs.key_heads)),
                )

    def _five_dimensional(self, piece: Piece, left: int) -> Piece:
        """Return a piece of mask with its heads laid out as ``[b, h, G, rows, cols]``."""
        groups = self._inputs.heads // self._inputs.key_heads

        def part(x: Tensor | None) -> Tensor | None:
            if x is None or x.dim() == 2:
                return x
            return x.unflatten(1, (-1, groups)) if x.shape[1] > 1 else x[:, :, None]

        cols = slice(piece.cols.start - left, piece.cols.stop - left)
        return Piece(cols, part(piece.ceiling), part(piece.floor), part(piece.bias))

    def _to_logits(self, z: Tensor, spare: Tensor, pieces: list[Piece], parts: set[str]) -> RowSums:
        """Turn scores (with a softcap, in nats) into logits in place.

        Returns:
            Each row's extremes but for the largest logit.
        """
        found: RowSums = {}
        if self._inputs.softcap is not None:
            if parts & {"raw_top", "raw_bottom"}:
                raw = torch.div(z, LN_2, out=spare)
                self._add_bias(raw, pieces)
                found["raw_bottom"] = self._smallest(raw, pieces)
                self._hide(raw, pieces)
                found["raw_top"] = raw.amax(-1)
            z.div_(self._inputs.softcap).tanh_().mul_(self._inputs.softcap / LN_2)
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
        """Return each row's smallest visible logit; lifts hidden ones above all others."""
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


def _budget(device: torch.device) -> int:
    """Return the number of scores in one block."""
    if device.type == "cpu":
        return _BLOCK_ELEMENTS * torch.get_num_threads()
    least, most = _DEVICE_ELEMENTS
    if device.type != "cuda" or not torch.cuda.is_available():
        return least
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(most, max(least, memory // _SHARE_OF_MEMORY // 8))
