"""Cache layer with a part of its keys and the length of the whole sequence.

The layer keeps, beside keys and values, the positions of the keys it still holds. Lengths and masks
are reported for the *logical* sequence, evicted keys included, so that a model builds position ids,
masks, padding and windows as it would for a full cache; at the attention call the mask's columns
are then gathered by these positions (:mod:`stabmon.analysis.kv_cache.cache.masks`).

Layout: one tensor ``[B, H_kv, M, D]`` per layer, M the largest number held by any head of any
sample. Where budgets differ between samples or heads, the slots on the left of the others are empty
(position -1, never seen by a query), and cost memory; slots and kept keys are counted apart. Layers
differ in M freely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class KeptKeys:
    """Mix-in for transformers' ``DynamicLayer`` to drop keys; see :mod:`.stock_cache`.

    Attributes:
        keys, values: ``[B, H_kv, M, D]``, or None before the first token.
        seen: number of tokens so far, evicted ones included.
        positions: ``[B, H_kv, M]`` int64 positions of the kept keys, ascending, -1 in empty slots;
            None while nothing is evicted.
        has_gaps: True if some slot is empty.
        memory: the policy's memory of each key, ``[B, H_kv, M]``.
        handed: keys given to the last forward, their positions, and whether some slots were empty.
    """

    keys: Tensor | None
    values: Tensor | None
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self._clear()
        self.ready: Callable[[], None] | None = None
        """Check before each use; raises if nothing is prepared to gather masks."""

    def _clear(self) -> None:
        self.seen = 0
        self.positions: Tensor | None = None
        self.has_gaps = False
        self.memory: dict[str, Tensor] = {}
        self.handed: tuple[Tensor, Tensor | None, bool] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and return all held ones.

        Args:
            key_states, value_states: ``[B, H_kv, n, D]`` of the new tokens.
            args, kwargs: passed on to ``DynamicLayer.update``.
        """
        if self.ready is not None:
            self.ready()
        new = key_states.shape[-2]
        whole: Any = super()
        keys, values = whole.update(key_states, value_states, *args, **kwargs)
        if self.positions is not None:
            place = torch.arange(self.seen, self.seen + new, device=self.positions.device)
            self.positions = torch.cat(
                [self.positions, place.expand(*self.positions.shape[:2], -1)], dim=-1
            )
        self.memory = {
            name: torch.nn.functional.pad(known, (0, new)) for name, known in self.memory.items()
        }
        self.seen += new
        self.handed = keys, self.positions, self.has_gaps
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, evicted ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask over all tokens so far."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raise an error for a rollback, since evicted keys are gone.

        Raises:
            ValueError: always, but for 0 tokens.
        """
        if tokens_to_remove:
            raise ValueError(
                "a compressed cache cannot be rolled back, as evicted keys are gone: switch "
                "assisted decoding off"
            )

    def reset(self) -> None:
        """Clear the layer."""
        super().reset()  # type: ignore[misc]
        self._clear()

    def _per_sample(self, take: Any) -> None:
        """Apply a selection of samples to all tensors."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = take(self.keys), take(self.values)
        self.positions = None if self.positions is None else take(self.positions)
        self.memory = {name: take(known) for name, known in self.memory.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the samples of a beam search's next step."""
        if self.seen:
            self._per_sample(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        if self.seen:
            self._per_sample(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples only."""
        if self.seen:
            self._per_sample(lambda held: held[indices])

    def held_positions(self) -> Tensor:
        """Return the positions of the held keys, ``[B, H_kv, M]``, -1 in empty slots."""
        if self.positions is not None:
            return self.positions
        if self.keys is None:
            return torch.zeros(0, 0, 0, dtype=torch.int64)
        return torch.arange(self.keys.shape[2], device=self.keys.device).expand(
            *self.keys.shape[:2], -1
        )

    def keep(self, kept: Tensor) -> Tensor:
        """Drop all other keys.

        Args:
            kept: ``[B, H_kv, M]`` bool; at least one in some row.

        Returns:
            ``[B, H_kv, M]`` the dropped positions, -1 elsewhere.
        """
        assert self.keys is not None
        assert self.values is not None
        positions = self.held_positions()
        kept = kept & (positions >= 0)
        dropped = positions.masked_fill(kept, -1)
        counts = kept.sum(-1)
        slots = max(1, int(counts.max()))
        if slots == positions.shape[-1] and not bool((dropped >= 0).any()):
            return dropped
        place = torch.arange(positions.shape[-1], device=positions.device)
        order = torch.where(kept, place, -1).argsort(dim=-1, stable=True)[..., -slots:]
        live = kept.gather(-1, order)
        self.positions = positions.gather(-1, order).masked_fill_(~live, -1)
        self.has_gaps = bool((counts < slots).any())
        wide = order[..., None]
        self.keys = self.keys.gather(2, wide.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, wide.expand(-1, -1, -1, self.values.shape[-1]))
        self.memory = {name: known.gather(-1, order) for name, known in self.memory.items()}
        return dropped
