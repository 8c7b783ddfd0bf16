"""Facts about a mask that one pass over it gives, remembered while the mask lives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SUMMARY_ROWS = 128
"""Query rows of a mask per pass, which keeps memory linear in the number of keys."""
_CLASSIC_MASK = -9999.0
"""Additive masks of old models hide with -10000 rather than -inf.

Such a value counts as hidden if the mask holds it and 0 only.
"""


@dataclass(frozen=True, eq=False)
class MaskSummary:
    """Facts of one mask, per row ``[B or 1, H or 1, Q]`` unless noted."""

    floor: float
    """Number: values at or below it hide."""
    is_bias: bool
    """Bool: some visible entry is not zero, so scores are changed pairwise."""
    n_visible: Tensor
    """Number of visible keys of a row, int64."""
    first: Tensor
    """First visible key of a row; K where nothing is visible."""
    last: Tensor
    """Last visible key of a row, -1 where nothing is visible."""
    seen: Tensor | None
    """``[B or 1, H or 1, K]`` bool: some row sees the key; None for all keys."""
    hides: bool = True
    """Bool: some key may be hidden from some row."""

    @cached_property
    def ranges(self) -> tuple[list[int], list[int]]:
        """First and last visible key of each row over batch and heads; K and -1 for none."""
        first, last = self.first.amin(dim=(0, 1)), self.last.amax(dim=(0, 1))
        low, high = torch.stack([first, last]).tolist()
        return low, high

    @cached_property
    def plain_ranges(self) -> tuple[list[int], list[int]]:
        """Each row's unbroken run of keys over all batch elements and heads, past the last.

        A row that sees other keys too has a range that is empty.
        """
        unbroken = (self.n_visible == self.last - self.first + 1).all(dim=0).all(dim=0)
        first, past = self.first.amax(dim=(0, 1)), self.last.amin(dim=(0, 1)) + 1
        nothing = torch.iinfo(torch.int64).max
        low = torch.where(unbroken, first, nothing)
        low, high = torch.stack([low, torch.where(unbroken, past, 0)]).tolist()
        return low, high

    def rows(self, index: Tensor) -> MaskSummary:
        """Return the summary of the query rows ``index`` only."""
        n_visible, first, last = (x[..., index] for x in (self.n_visible, self.first, self.last))
        return replace(self, n_visible=n_visible, first=first, last=last)


_summaries: dict[tuple[object, ...], tuple[StorageWeakRef, MaskSummary]] = {}


def summarize(mask: Tensor) -> MaskSummary:
    """Return the summary of a mask, computed once while its storage lives unchanged.

    A model hands one mask to every layer.

    Args:
        mask: ``[B or 1, H or 1, Q or 1, K]``, bool or additive float.
    """
    if mask.is_inference():  # without a version counter a change would go unnoticed
        return _make_summary(mask)
    # Tensor._version: torch counts in-place writes in it. Checked with torch 2.13. Without it a
    # mask that is written again in place would keep its old summary.
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
    if mask.device.type != "cpu":
        return _summary_at_once(mask)
    floor, is_bias = -math.inf, False
    if mask.dtype != torch.bool:
        floor = torch.finfo(mask.dtype).min / 2
        low = mask.amin().item()
        rows = mask.split(SUMMARY_ROWS, dim=2)
        if floor < low <= _CLASSIC_MASK and all(
            bool(((part == 0) | (part == low)).all()) for part in rows
        ):
            floor = low
        if low > floor:
            return _nothing_hidden(mask, floor, low)
    keys = mask.shape[-1]
    index = torch.arange(keys, device=mask.device)
    counts, firsts, lasts, seen = [], [], [], torch.zeros((), dtype=torch.bool, device=mask.device)
    for part in mask.split(SUMMARY_ROWS, dim=2):
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


def _summary_at_once(mask: Tensor) -> MaskSummary:
    """Return the summary with one wait for the mask's device, where the other has many."""
    keys, device = mask.shape[-1], mask.device
    lowest = torch.zeros((), device=device)
    if mask.dtype != torch.bool:
        least = torch.full((), torch.finfo(mask.dtype).min / 2, dtype=mask.dtype, device=device)
        low = mask.amin()
        parts = mask.split(SUMMARY_ROWS, dim=2)
        two = torch.stack([((part == 0) | (part == low)).all() for part in parts]).all()
        classic = (least < low) & (low <= _CLASSIC_MASK) & two
        lowest = torch.where(classic, low, least)
    index = torch.arange(keys, device=device)
    counts, firsts, lasts, changed = [], [], [], []
    seen = torch.zeros((), dtype=torch.bool, device=device)
    for part in mask.split(SUMMARY_ROWS, dim=2):
        visible = part if part.dtype == torch.bool else part > lowest
        if part.dtype != torch.bool:
            changed.append(((part != 0) & visible).any())
        counts.append(visible.sum(-1))
        firsts.append(torch.where(visible, index, keys).amin(-1))
        lasts.append(torch.where(visible, index, -1).amax(-1))
        seen = seen | visible.any(-2)
    n_visible = torch.cat(counts, -1)
    is_bias = torch.stack(changed).any() if changed else torch.zeros_like(seen).any()
    facts = [lowest, is_bias, seen.all(), (n_visible < keys).any()]
    floor, bias, all_seen, hides = torch.stack([each.double() for each in facts]).tolist()
    return MaskSummary(
        floor if mask.dtype != torch.bool else -math.inf,
        bool(bias),
        n_visible,
        torch.cat(firsts, -1),
        torch.cat(lasts, -1),
        None if all_seen else seen,
        hides=mask.dtype == torch.bool or bool(hides),
    )
