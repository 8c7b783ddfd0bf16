"""Visible keys of each query by causality and window, which need no mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Band:
    """The band of keys around the diagonal that causality and window leave visible.

    Arguments as for :class:`~stabmon.operator.visibility.visibility.Visibility`.
    """

    queries: int
    keys: int
    is_causal: bool
    window: int | None
    offset: int
    device: torch.device
    positions: Tensor | None = None

    @cached_property
    def row_positions(self) -> Tensor:
        """``[Q]`` int64 position of each query row."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.queries, device=self.device)

    @cached_property
    def _position_list(self) -> list[int]:
        return list(range(self.queries)) if self.positions is None else self.positions.tolist()

    def _ends(self, rows: slice) -> tuple[int, int]:
        """Return the keys on the diagonal at the first and the last of some rows."""
        first, last = self._position_list[rows.start], self._position_list[rows.stop - 1]
        return first + self.offset, last + self.offset

    def key_range(self, rows: slice) -> tuple[int, int]:
        """Return the keys that some row of ``rows`` sees, as (first, past the last)."""
        (first, last), low, high = self._ends(rows), 0, self.keys
        if self.is_causal:
            high = min(high, last + 1)
        if self.window is not None:
            low = max(low, first - self.window + 1)
            if not self.is_causal:
                high = min(high, last + self.window)
        return low, max(high, 0)

    def common_range(self, rows: slice) -> tuple[int, int]:
        """Return the keys that all of ``rows`` see, as (first, past the last)."""
        (first, last), low, high = self._ends(rows), 0, self.keys
        if self.window is not None:
            low = last - self.window + 1
            high = high if self.is_causal else first + self.window
        return low, min(high, first + 1) if self.is_causal else high

    def hidden(self, rows: slice, cols: slice) -> Tensor | None:
        """Return the hidden entries of a block, ``[rows, cols]`` bool; None for none."""
        low, high = self.common_range(rows)
        if low <= cols.start and cols.stop <= high:
            return None
        position = (self.row_positions[rows] + self.offset)[:, None]
        return self.hides(position, torch.arange(cols.start, cols.stop, device=self.device))

    def hides(self, position: Tensor, key: Tensor) -> Tensor:
        """Return whether rows hide keys.

        Args:
            position: int64 keys on the diagonal of the rows.
            key: int64 keys, broadcast against ``position``.

        Returns:
            Bool, of the broadcast shape.
        """
        hidden = key > position
        hidden = hidden if self.is_causal else torch.zeros_like(hidden)
        if self.window is not None:
            hidden = hidden | (key <= position - self.window)
            if not self.is_causal:
                hidden = hidden | (key >= position + self.window)
        return hidden

    def n_visible(self) -> Tensor:
        """Return the number of keys that each row sees, ``[Q]`` int64."""
        position, newest = self.row_positions + self.offset, self.keys - 1
        low, high = torch.zeros_like(position), torch.full_like(position, newest)
        if self.window is not None:
            low = (position - self.window + 1).clamp(min=0)
            high = (position + self.window - 1).clamp(max=newest)
        if self.is_causal:
            high = position.clamp(max=newest)
        return (high - low + 1).clamp(min=0)
