"""Which keys each query sees: causality, window, mask and bias as one object that is asked block by
block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

HIDDEN = -1e30
"""What a hidden logit is set to: below every real one, and finite, so that 0 times it is 0."""
_SUMMARY_ROWS = 128
"""Query rows of a mask looked at together: keeps the summary's memory linear in the number of
keys.
"""
_CLASSIC_MASK = -9999.0
"""Additive masks of old models hide with -10000 rather than -inf; such a value counts as hidden if
the mask holds it and 0 only.
"""


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a block of logits in which something is hidden or biased; the tensors broadcast
    to ``[B, H, rows, cols]``.
    """

    cols: slice
    ceiling: Tensor | None
    """``HIDDEN`` where hidden and +inf where visible: logits are hidden by their minimum with it.
    None where nothing is hidden.
    """
    floor: Tensor | None
    """Its negative: what is hidden is lifted above all logits by their maximum with it."""
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class MaskSummary:
    """What a pass over a mask learned; all but ``floor`` and ``is_bias`` are ``[B or 1, H or 1,
    Q]``.
    """

    floor: float
    """Values at or below this hide."""
    is_bias: bool
    """Some visible entry is not zero, so scores are changed pairwise."""
    n_visible: Tensor
    first: Tensor
    """First visible key of a row; K where nothing is visible."""
    last: Tensor
    """Last visible key of a row, -1 where nothing is visible."""
    seen: Tensor | None
    """``[B or 1, H or 1, K]``: the keys that some row sees; None where that is all."""
    hides: bool = True
    """Some key may be hidden from some row."""

    def rows(self, index: Tensor) -> MaskSummary:
        """The same of some rows only."""
        n_visible, first, last = (x[..., index] for x in (self.n_visible, self.first, self.last))
        return replace(self, n_visible=n_visible, first=first, last=last)


_summaries: dict[tuple[object, ...], tuple[StorageWeakRef, MaskSummary]] = {}


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom among Q queries and K keys.

    Args:
        queries, keys: Q and K.
        is_causal: query at position i sees keys up to i + offset.
        window: with ``is_causal`` a query sees the ``window`` newest of these, itself included;
            without, all keys at a distance below ``window``.
        mask: ``[B or 1, H or 1, Q or 1, K]``, bool (True is visible) or additive float (-inf or the
            dtype's minimum hides), or None.
        positions: ``[Q]`` position of each query row among ``offset``-aligned rows, ascending; None
            for 0 … Q - 1.
        offset: K - Q of the whole call, so that the last query is aligned with the last key.
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
        """Whether every query sees every key."""
        return self.mask is None and not self.is_causal and self.window is None

    @cached_property
    def _position_list(self) -> list[int]:
        return list(range(self.queries)) if self.positions is None else self.positions.tolist()

    @cached_property
    def summary(self) -> MaskSummary | None:
        """What the mask is like, or None without one; computed once for a mask that several calls
        share.
        """
        if self.whole is None or self.positions is None:
            return None if self.mask is None else _summarize(self.mask)
        see = self.whole.summary
        return see if see is None or see.n_visible.shape[-1] == 1 else see.rows(self.positions)

    @property
    def is_bias(self) -> bool:
        """Whether the mask changes visible scores."""
        return self.summary is not None and self.summary.is_bias

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The keys that rows ``start`` to ``stop`` may see at all, as (first, past the last); may
        be empty.
        """
        low, high = self._structural_range(
            self._position_list[start], self._position_list[stop - 1]
        )
        if self.mask is not None:
            first, last = self._mask_range
            low = max(low, min(first[start:stop]))
            high = min(high, max(last[start:stop]) + 1)
        return low, max(low, high)

    def block(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor | None]:
        """Hidden entries (bool) and bias of a block, each broadcasting to ``[B, H, rows, cols]``,
        or None where there are none.
        """
        hidden = self._structural_block(rows, cols)
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
        """The parts of a block that need masking or bias, from left to right; columns in none of
        them are plain.

        Args:
            rows, cols: the block.
            batch, heads: the batch elements and query heads that are asked about.
        """
        some = self.of(batch, heads)
        return [some._piece(rows, side) for side in self.sides(rows, cols)]

    def sides(self, rows: slice, cols: slice) -> list[slice]:
        """Return the columns of a block outside of which every row sees every key without bias,
        from left to right.
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
        """Whether all heads of all batch elements see alike."""
        return self.mask is None or self.mask.shape[:2] == (1, 1)

    def of(self, batch: slice, heads: slice) -> Visibility:
        """Return the visibility of some batch elements and heads, for asking it for blocks."""
        if self.mask is None or self.is_shared:
            return self
        part = self.mask[batch if self.mask.shape[0] > 1 else slice(None)]
        some = replace(self, mask=part[:, heads] if part.shape[1] > 1 else part)
        some.__dict__["summary"] = (
            self.summary
        )  # a pass over a part of the mask would learn nothing new
        return some

    def _plain_range(self, rows: slice) -> tuple[int, int]:
        """Keys that all these rows of all heads see without bias, as (first, past the last); not
        all such keys under a mask with holes.
        """
        low, high = 0, self.keys
        first, last = (
            self._position_list[rows.start] + self.offset,
            self._position_list[rows.stop - 1] + self.offset,
        )
        if self.window is not None:
            low = last - self.window + 1
            high = high if self.is_causal else first + self.window
        if self.is_causal:
            high = min(high, first + 1)
        if self.mask is not None:
            mask_low, mask_high = self._mask_plain_range
            low, high = max(low, max(mask_low[rows])), min(high, min(mask_high[rows]))
        return low, high

    def _piece(self, rows: slice, cols: slice) -> Piece:
        if self.mask is None:
            return Piece(cols, *self._structural_limits(rows, cols), None)
        assert self.summary is not None
        if not self.summary.hides and self._structural_block(rows, cols) is None:
            return Piece(
                cols,
                None,
                None,
                self.mask[:, :, rows if self.mask.shape[2] > 1 else slice(0, 1), cols],
            )
        hidden, bias = self.block(rows, cols)
        assert hidden is not None
        return Piece(cols, *_limits(hidden), bias)

    def _structural_limits(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """Ceiling and floor, ``[rows, cols]``; made once for all blocks that lie alike towards the
        diagonal.
        """
        alike = rows.stop - rows.start, cols.stop - cols.start, rows.start - cols.start
        known = self._known_limits.get(alike) if self.positions is None else None
        if known is None:
            hidden = self._structural_block(rows, cols)
            assert hidden is not None
            known = self._known_limits[alike] = _limits(hidden)
        return known

    @cached_property
    def _known_limits(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def n_visible(self) -> Tensor:
        """``[B or 1, H or 1, Q]`` int64: how many keys each query sees."""
        structural = self.is_causal or self.window is not None
        if self.mask is None:
            position = self._row_positions() + self.offset
            high = (
                position.clamp(max=self.keys - 1)
                if self.is_causal
                else torch.full_like(position, self.keys - 1)
            )
            low = torch.zeros_like(position)
            if self.window is not None:
                low = (position - self.window + 1).clamp(min=0)
                high = (
                    high
                    if self.is_causal
                    else (position + self.window - 1).clamp(max=self.keys - 1)
                )
            return (high - low + 1).clamp(min=0)[None, None]
        assert self.summary is not None
        if not structural:
            return self.summary.n_visible
        return self._count()

    @cached_property
    def first_visible(self) -> Tensor | None:
        """``[B or 1, H or 1]`` int64: the first key that the mask lets any query of the whole call
        see; None for key 0 without one.
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
        position, first = self._row_positions() + self.offset, self.first_visible
        key = (
            torch.zeros(1, 1, 1, dtype=torch.int64, device=self.device)
            if first is None
            else first[..., None]
        )
        seen = key <= position if self.is_causal else torch.ones_like(key <= position)
        if self.window is not None:
            seen = (
                seen
                & (key > position - self.window)
                & (self.is_causal | (key < position + self.window))
            )
        return seen if self.summary is None else seen & (self.summary.first == key)

    @property
    def seen_keys(self) -> Tensor | None:
        """``[B or 1, H or 1, K]`` bool: the keys that the mask lets any query of the whole call
        see; None where that is all.
        """
        if self.whole is not None:
            return self.whole.seen_keys
        return None if self.summary is None else self.summary.seen

    @cached_property
    def is_padding(self) -> Tensor | None:
        """``[B or 1, H or 1, Q]`` bool: the query's own key is hidden from every row; None where no
        query is known to be padding.

        That a query has a key of its own is known under causality and by ``is_self``.
        """
        if self.whole is not None:
            padding = self.whole.is_padding
            return padding if padding is None else padding[..., self._row_positions()]
        seen = self.seen_keys
        if seen is None or self.offset < 0 or not (self.is_self or self.is_causal):
            return None
        padding = ~seen[..., self.offset :]
        if self.offset == 0 or self.is_causal or self.mask is None or self.mask.shape[2] == 1:
            return padding
        own = self.mask.diagonal(self.offset, -2, -1)
        assert self.summary is not None
        sees_own = own if own.dtype == torch.bool else own > self.summary.floor
        aligned = bool(
            (sees_own | padding).all()
        )  # else keys stand elsewhere, as in a cache with room to spare
        return padding if aligned else None

    def select(self, index: Tensor) -> Visibility:
        """The same for the query rows ``index`` (ascending) only."""
        positions = self._row_positions()[index]
        mask = self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, index]
        whole = self.whole or self
        return Visibility(
            len(index),
            self.keys,
            self.is_causal,
            self.window,
            mask,
            self.offset,
            self.device,
            positions,
            whole,
        )

    def _row_positions(self) -> Tensor:
        return (
            torch.arange(self.queries, device=self.device)
            if self.positions is None
            else self.positions
        )

    @cached_property
    def _mask_range(self) -> tuple[list[int], list[int]]:
        """First and last visible key of each row, over batch and heads."""
        assert self.summary is not None
        first = self.summary.first.amin(dim=(0, 1)).expand(self.queries)
        last = self.summary.last.amax(dim=(0, 1)).expand(self.queries)
        return first.tolist(), last.tolist()

    @cached_property
    def _mask_plain_range(self) -> tuple[list[int], list[int]]:
        """Keys that each row sees over all batch elements and heads, where it sees no key but an
        unbroken run; else (K, 0).
        """
        see = self.summary
        assert see is not None
        unbroken = (see.n_visible == see.last - see.first + 1).all(dim=0).all(dim=0) & (
            not see.is_bias
        )
        low = torch.where(unbroken, see.first.amax(dim=(0, 1)), self.keys).expand(self.queries)
        high = torch.where(unbroken, see.last.amin(dim=(0, 1)) + 1, 0).expand(self.queries)
        return low.tolist(), high.tolist()

    def _structural_range(self, first_position: int, last_position: int) -> tuple[int, int]:
        low, high = 0, self.keys
        if self.is_causal:
            high = min(high, last_position + self.offset + 1)
        if self.window is not None:
            low = max(low, first_position + self.offset - self.window + 1)
            if not self.is_causal:
                high = min(high, last_position + self.offset + self.window)
        return low, max(high, 0)

    def _structural_block(self, rows: slice, cols: slice) -> Tensor | None:
        """Hidden by causality or window, ``[rows, cols]``; None where nothing is."""
        if not self.is_causal and self.window is None:
            return None
        first, last = (
            self._position_list[rows.start] + self.offset,
            self._position_list[rows.stop - 1] + self.offset,
        )
        past = self.is_causal and cols.stop - 1 > first
        old = self.window is not None and last - self.window + 1 > cols.start
        ahead = (
            self.window is not None
            and not self.is_causal
            and cols.stop - 1 > first + self.window - 1
        )
        if not (past or old or ahead):
            return None
        position = (self._row_positions()[rows] + self.offset)[:, None]
        key = torch.arange(cols.start, cols.stop, device=self.device)
        hidden = (
            key > position
            if self.is_causal
            else torch.zeros(len(position), len(key), dtype=torch.bool, device=self.device)
        )
        if self.window is not None:
            hidden = hidden | (key <= position - self.window)
            if not self.is_causal:
                hidden = hidden | (key >= position + self.window)
        return hidden

    def _count(self) -> Tensor:
        counts = []
        for start in range(0, self.queries, _SUMMARY_ROWS):
            rows = slice(start, min(start + _SUMMARY_ROWS, self.queries))
            hidden, _ = self.block(rows, slice(0, self.keys))
            assert hidden is not None
            counts.append((~hidden).sum(-1))
        return torch.cat(counts, dim=-1)


def _limits(hidden: Tensor) -> tuple[Tensor, Tensor]:
    ceiling = torch.full_like(hidden, math.inf, dtype=torch.float32).masked_fill_(hidden, HIDDEN)
    return ceiling, -ceiling


def _summarize(mask: Tensor) -> MaskSummary:
    """The summary of ``mask``, remembered while its storage lives unchanged: a model hands one mask
    to every layer.
    """
    if mask.is_inference():  # has no version that would tell of a change
        return _make_summary(mask)
    stamp = (mask.data_ptr(), tuple(mask.shape), mask.stride(), mask.dtype, mask._version)
    known = _summaries.get(stamp)
    if known is not None and not known[0].expired():
        return known[1]
    summary = _make_summary(mask)
    for old in [key for key, (storage, _) in _summaries.items() if storage.expired()]:
        del _summaries[old]
    _summaries[stamp] = (StorageWeakRef(mask.untyped_storage()), summary)
    return summary


def _make_summary(mask: Tensor) -> MaskSummary:
    floor, is_bias = -math.inf, False
    if mask.dtype != torch.bool:
        floor = torch.finfo(mask.dtype).min / 2
        low = mask.amin().item()
        rows = mask.split(_SUMMARY_ROWS, dim=2)
        if floor < low <= _CLASSIC_MASK and all(
            bool(((part == 0) | (part == low)).all()) for part in rows
        ):
            floor = low
        if low > floor:
            return _nothing_hidden(mask, floor, low)
    keys = mask.shape[-1]
    index = torch.arange(keys, device=mask.device)
    counts, firsts, lasts, seen = [], [], [], torch.zeros((), dtype=torch.bool, device=mask.device)
    for part in mask.split(_SUMMARY_ROWS, dim=2):
        visible = part if part.dtype == torch.bool else part > floor
        if part.dtype != torch.bool and not is_bias:
            is_bias = bool(((part != 0) & visible).any())
        counts.append(visible.sum(-1))
        firsts.append(torch.where(visible, index, keys).amin(-1))
        lasts.append(torch.where(visible, index, -1).amax(-1))
        seen = seen | visible.any(-2)
    hidden = None if bool(seen.all()) else seen
    return MaskSummary(
        floor, is_bias, torch.cat(counts, -1), torch.cat(firsts, -1), torch.cat(lasts, -1), hidden
    )


def _nothing_hidden(mask: Tensor, floor: float, low: float) -> MaskSummary:
    rows = torch.zeros(mask.shape[:-1], dtype=torch.int64, device=mask.device)
    keys, is_bias = mask.shape[-1], low != 0 or mask.amax().item() != 0
    return MaskSummary(floor, is_bias, rows + keys, rows, rows + keys - 1, None, hides=False)
