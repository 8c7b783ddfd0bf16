"""Losses in the vectors that ranks add and compare: their mean, the largest, and its rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_LOSSES = 256
"""Newest steps whose losses ranks exchange at a sampled step."""
_RANKS = 1 << 20
"""Ranks that fit into the low bits of a float64 whose other bits hold a float32."""


def with_rank(loss: float, number: int) -> float:
    """Return a loss as float32 with a rank in the low bits, which the largest keeps."""
    if math.isnan(loss):
        loss = math.inf
    limit = torch.finfo(torch.float32).max
    short = torch.tensor([min(max(loss, -limit), limit)], dtype=torch.float32).double()
    return float((short.view(torch.int64) | (number % _RANKS)).view(torch.float64))


def without_rank(value: float) -> tuple[float, int]:
    bits = torch.tensor([value], dtype=torch.float64).view(torch.int64)
    number = int(bits) % _RANKS
    loss = float((bits - number).view(torch.float64))
    return (math.inf if loss >= torch.finfo(torch.float32).max else loss), number


def mean_losses(step: int, added: Tensor) -> tuple[tuple[int, float], ...]:
    """Return (step, mean loss) of the steps of which some rank knows a loss."""
    first = step - added.shape[1] + 1
    pairs = enumerate(zip(*added.tolist(), strict=True), start=first)
    return tuple((at, total / count) for at, (total, count) in pairs if count)


def worst_losses(step: int, largest: Tensor) -> tuple[tuple[int, float, int], ...]:
    """Return (step, largest loss, its rank) of the same steps."""
    first = step - len(largest) + 1
    known = [(at, value) for at, value in enumerate(largest.tolist(), first) if value > -math.inf]
    return tuple((at, *without_rank(value)) for at, value in known)
