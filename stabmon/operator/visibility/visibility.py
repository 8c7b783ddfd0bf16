"""Visible keys of each query: causality, window, mask and bias, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stabmon.operator.visibility.band import Band
from stabmon.operator.visibility.mask_summary import SUMMARY_ROWS, MaskSummary, summarize
from stabmon.operator.visibility.pieces import Piece, limits


@dataclass(frozen=True, eq=False)
class Visibility:
    """Visible keys of Q queries among K keys.

    Args:
        queries: Q.
        keys: K.
        is_causal: query at position i sees keys up to i + offset.
        window: with ``is_causal`` a query sees the ``window`` newest of these, itself included;
            without, all keys at a distance below ``window``.
        mask: ``[B or 1, H or 1, Q or 1, K]``, bool (True is visible) or additive float (-inf or the
            dtype's minimum hides), or None.
        positions: ``[Q]`` position of each query row among ``offset``-aligned rows, ascending; None
            for 0 … Q - 1.
        offset: K - Q of the whole call, so that the last query is aligned with the last key.
        device: of the mask and of all results.
        whole: the visibility of all rows, where this one is of some of them.
        is_self: query i is of the same token as key i + offset.
    """

    queries: int
    keys: int
    is_causal: bool
    window: int | None
    mask: Tensor | None
    offset: int
    device: torch.device
    positions: Tensor | None = None
    whole: Visibility | None = None
    is_self: bool = False

    @property
    def everything(self) -> bool:
        """True where every query sees every key."""
        return self.mask is None and not self.is_causal and self.window is None

    @cached_property
    def band(self) -> Band:
        """The part of it that needs no mask."""
        return Band(
            *(self.queries, self.keys, self.is_causal, self.window),
            *(self.offset, self.device, self.positions),
        )

    @cached_property
    def summary(self) -> MaskSummary | None:
        """Facts of the mask; None without one. Computed once for a mask that calls share."""
        if self.whole is None or self.positions is None:
            return None if self.mask is None else summarize(self.mask)
        see = self.whole.summary
        return see if see is None or see.n_visible.shape[-1] == 1 else see.rows(self.positions)

    @property
    def is_bias(self) -> bool:
        """True where the mask changes visible scores."""
        return self.summary is not None and self.summary.is_bias

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return the keys that rows ``start`` to ``stop`` may see.

        Returns:
            (first, past the last), equal where the range is empty.
        """
        low, high = self.band.key_range(slice(start, stop))
        if self.mask is not None:
            first, last = self._mask_range
            low = max(low, min(first[start:stop]))
            high = min(high, max(last[start:stop]) + 1)
        return low, max(low, high)

    def block(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor | None]:
        """Return the hidden entries and the bias of a block.

        Args:
            rows: query rows, with start and stop.
            cols: keys, with start and stop.

        Returns:
            Bool and float, each broadcasting to ``[B, H, rows, cols]``; None where there are none.
        """
        hidden = self.band.hidden(rows, cols)
        if self.mask is None:
            return hidden, None
        assert self.summary is not None
        part = self.mask[:, :, rows if self.mask.shape[2] > 1 else slice(0, 1), cols]
        masked = part.logical_not() if part.dtype == torch.bool else part <= self.summary.floor
        bias = part if self.summary.is_bias else None
        return (masked if hidden is None else masked | hidden), bias

    def pieces(
        self, rows: slice, cols: slice, batch: slice = slice(None), heads: slice = slice(None)
    ) -> list[Piece]:
        """Return the parts of a block that need masking or bias, from left to right.

        Columns in none of them are plain.

        Args:
            rows: query rows of the block.
            cols: keys of the block.
            batch: batch elements.
            heads: query heads.
        """
        some = self.of(batch, heads)
        return [some._piece(rows, side) for side in self.sides(rows, cols)]

    def sides(self, rows: slice, cols: slice) -> list[slice]:
        """Return the columns of a block that are not plain, from left to right.

        Outside of them every row sees every key without bias.
        """
        if self.everything:
            return []
        seen_from, seen_to = self._plain_range(rows)
        seen_from, seen_to = max(seen_from, cols.start), min(seen_to, cols.stop)
        sides = (
            [cols]
            if seen_from >= seen_to
            else [slice(cols.start, seen_from), slice(seen_to, cols.stop)]
        )
        return [side for side in sides if side.start < side.stop]

    @property
    def is_shared(self) -> bool:
        """True where all heads of all batch elements see the same keys."""
        return self.mask is None or self.mask.shape[:2] == (1, 1)

    def of(self, batch: slice, heads: slice) -> Visibility:
        """Return the visibility of some batch elements and heads, for its blocks."""
        if self.mask is None or self.is_shared:
            return self
        part = self.mask[batch if self.mask.shape[0] > 1 else slice(None)]
        some = replace(self, mask=part[:, heads] if part.shape[1] > 1 else part)
        # both hold for the part too; a pass over a part of the mask would learn nothing new
        some.__dict__.update(summary=self.summary, band=self.band)
        return some

    def _plain_range(self, rows: slice) -> tuple[int, int]:
        """Return keys that all these rows of all heads see without bias.

        (first, past the last); not all such keys under a mask with holes.
        """
        low, high = self.band.common_range(rows)
        if self.mask is not None:
            mask_low, mask_high = self._mask_plain_range
            low, high = max(low, max(mask_low[rows])), min(high, min(mask_high[rows]))
        return low, high

    def _piece(self, rows: slice, cols: slice) -> Piece:
        if self.mask is None:
            return Piece(cols, *self._structural_limits(rows, cols), None)
        assert self.summary is not None
        if not self.summary.hides and self.band.hidden(rows, cols) is None:
            plain = self.mask[:, :, rows if self.mask.shape[2] > 1 else slice(0, 1), cols]
            return Piece(cols, None, None, plain)
        hidden, bias = self.block(rows, cols)
        assert hidden is not None
        return Piece(cols, *limits(hidden), bias)

    def _structural_limits(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """Return ceiling and floor, ``[rows, cols]``.

        Made once for all blocks that lie alike towards the diagonal.
        """
        alike = rows.stop - rows.start, cols.stop - cols.start, rows.start - cols.start
        known = self._known_limits.get(alike) if self.positions is None else None
        if known is None:
            hidden = self.band.hidden(rows, cols)
            assert hidden is not None
            known = self._known_limits[alike] = limits(hidden)
        return known

    @cached_property
    def _known_limits(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def n_visible(self) -> Tensor:
        """``[B or 1, H or 1, Q]`` int64: number of keys that each query sees."""
        if self.summary is None:
            return self.band.n_visible()[None, None]
        if not self.is_causal and self.window is None:
            return self.summary.n_visible
        counts = []
        for start in range(0, self.queries, SUMMARY_ROWS):
            rows = slice(start, min(start + SUMMARY_ROWS, self.queries))
            hidden, _ = self.block(rows, slice(0, self.keys))
            assert hidden is not None
            counts.append((~hidden).sum(-1))
        return torch.cat(counts, dim=-1)

    @cached_property
    def first_visible(self) -> Tensor | None:
        """``[B or 1, H or 1]`` int64: first key that any query of the whole call may see.

        By the mask alone; None, for key 0, without one.
        """
        if self.whole is not None:
            return self.whole.first_visible
        if self.mask is None:
            return None
        assert self.summary is not None
        return self.summary.first.amin(-1).clamp(max=self.keys - 1)

    @cached_property
    def sees_first(self) -> Tensor:
        """``[B or 1, H or 1, Q]`` bool: the row sees the key of :attr:`first_visible`."""
        position, first = self.band.row_positions + self.offset, self.first_visible
        key = position.new_zeros(1, 1, 1) if first is None else first[..., None]
        seen = ~self.band.hides(position, key)
        return seen if self.summary is None else seen & (self.summary.first == key)

    @property
    def seen_keys(self) -> Tensor | None:
        """``[B or 1, H or 1, K]`` bool: some query of the whole call may see the key.

        By the mask alone; None for all keys.
        """
        if self.whole is not None:
            return self.whole.seen_keys
        return None if self.summary is None else self.summary.seen

    @cached_property
    def is_padding(self) -> Tensor | None:
        """``[B or 1, H or 1, Q]`` bool: the query's own key is hidden from every row.

        None where no query is known to be padding. That a query has a key of its own is known
        under causality and by ``is_self``.
        """
        if self.whole is not None:
            padding = self.whole.is_padding
            return padding if padding is None else padding[..., self.band.row_positions]
        seen = self.seen_keys
        if seen is None or self.offset < 0 or not (self.is_self or self.is_causal):
            return None
        padding = ~seen[..., self.offset :]
        if self.offset == 0 or self.is_causal or self.mask is None or self.mask.shape[2] == 1:
            return padding
        own = self.mask.diagonal(self.offset, -2, -1)
        assert self.summary is not None
        sees_own = own if own.dtype == torch.bool else own > self.summary.floor
        # else keys stand elsewhere, as in a cache with room to spare
        aligned = (sees_own | padding).all()
        if self.device.type != "cpu":
            return padding & aligned  # to ask would make the host wait
        return padding if bool(aligned) else None

    def select(self, index: Tensor) -> Visibility:
        """Return the visibility of the query rows ``index`` (int64, ascending) only."""
        mask = self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, index]
        return replace(
            self,
            queries=len(index),
            mask=mask,
            positions=self.band.row_positions[index],
            whole=self.whole or self,
        )

    @cached_property
    def _mask_range(self) -> tuple[list[int], list[int]]:
        """Return first and last visible key of each row, over batch and heads."""
        assert self.summary is not None
        return self._for_each_row(*self.summary.ranges)

    @cached_property
    def _mask_plain_range(self) -> tuple[list[int], list[int]]:
        """Return each row's unbroken run of keys over all batch elements and heads.

        Empty for a row that sees other keys too.
        """
        assert self.summary is not None
        if self.summary.is_bias:
            return self._for_each_row([self.keys], [0])
        return self._for_each_row(*self.summary.plain_ranges)

    def _for_each_row(self, *bounds: list[int]) -> tuple[list[int], list[int]]:
        first, last = (each * self.queries if len(each) == 1 else each for each in bounds)
        return first, last


def visibility_of(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool,
    window: int | None,
    mask: Tensor | None,
    is_self: bool = False,
) -> Visibility:
    """Return the visibility of one call, whose mask broadcasts to ``[B, H, Q, K]``."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(-1, -1, -1, keys) if mask.shape[-1] == 1 else mask
    return Visibility(
        queries, keys, is_causal, window, mask, keys - queries, query.device, is_self=is_self
    )
