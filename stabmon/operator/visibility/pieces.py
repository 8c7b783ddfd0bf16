"""Parts of a block of logits that need masking or bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -1e30
"""Value of a hidden logit: below every real one, and finite, so that 0 times it is 0."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a block of logits in which something is hidden or biased.

    The tensors broadcast to ``[B, H, rows, cols]``.
    """

    cols: slice
    ceiling: Tensor | None
    """``HIDDEN`` where hidden and +inf where visible; None where nothing is hidden.

    Logits are hidden by their minimum with it.
    """
    floor: Tensor | None
    """Its negative: what is hidden is lifted above all logits by their maximum with it."""
    bias: Tensor | None


def limits(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ceiling and the floor of a :class:`Piece` from its hidden entries."""
    ceiling = torch.full_like(hidden, math.inf, dtype=torch.float32).masked_fill_(hidden, HIDDEN)
    return ceiling, -ceiling
