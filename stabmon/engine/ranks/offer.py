"""Offer a rank's part in the exchange of a sampled step, and find what all know after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.process_group import world_size
from stabmon._torch.ranks.share import RankShare
from stabmon.engine.ranks.merge import GROUP, Layout, common_key
from stabmon.records import LayerInfo
from stabmon.signals import HeadSums

Sums = Mapping[str, Mapping[str, HeadSums]]
GRADIENT, QUERY_KEY, PART = ADDED = ("gradient of ", "query_key of ", "part of ")
"""Kinds of squared norms that ranks add, each followed by the layer or part of the model."""
KINDS = (*ADDED, GROUP)
"""All kinds of numbers beside the signals."""


@dataclass(frozen=True)
class Shared:
    """Knowledge that all ranks share after a sampled step's exchange."""

    sums: dict[str, dict[str, HeadSums]]
    """Signals over all ranks, by the layers' common names, of all heads."""
    squares: dict[str, list[float]] = field(default_factory=dict)
    """Sums over ranks of what they offered; without those that some rank lacked."""
    groups: dict[str, list[float]] = field(default_factory=dict)
    """The largest numbers of each parameter group over ranks, where these are stages."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, mean loss over ranks) of the newest steps."""
    rank_losses: tuple[tuple[int, float, int], ...] = ()
    """(step, largest loss of a rank, that rank) of the newest steps."""


@dataclass
class Offer:
    """Share of this rank in a sampled step's exchange; the defaults where it has nothing."""

    sums: Sums = field(default_factory=dict)
    squares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Numbers of this rank's shards that are to be added, by name."""
    whole: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The same numbers of tensors that this rank holds whole; added where ranks are stages."""
    groups: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Numbers of parameter groups, of which the largest over ranks counts where these are stages."""
    losses: Sequence[tuple[int, float]] = ()
    ahead: int = 0
    """Steps to the next sample that this rank wishes for; 0 for no wish."""
    least: int = 1
    """Least number of steps to the next sample that its measured time allows."""
    gradient_norm: float = math.nan
    """L2 norm of all gradients, to compare ranks by its bits."""
    info: Mapping[str, LayerInfo] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Facts about the layers of ``sums``, and their modules."""


@dataclass(frozen=True)
class Numbers:
    """Numbers beside the signals."""

    total: Tensor
    count: Tensor


SQUARES, LARGEST = OTHERS = ("squares", "largest")
"""Names of entries of the vector that are no signals, but numbers to be added, or compared."""


def entries_of(
    own: Offer, share: RankShare | None = None, scale: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Return what a rank gives to the vector, by layer or key and by name.

    Args:
        own: what it has measured.
        share: gives common names, and places the heads here among all.
        scale: ranks over ranks of this stage, by which numbers to be added are multiplied.
    """
    share = share or RankShare()
    found: dict[str, dict[str, Any]] = {
        share.common(layer): {name: placed(each, layer, share) for name, each in signals.items()}
        for layer, signals in own.sums.items()
    }
    whole = own.whole if share.is_staged else {}
    numbers = {
        **{key: [x / world_size() for x in each] for key, each in whole.items()},
        **own.squares,
    }
    for key, each in numbers.items():
        total = torch.tensor(list(each), dtype=torch.float64) * scale
        name = common_key(key, kind_of(key), share.prefix)
        found[name] = {SQUARES: Numbers(total, torch.ones_like(total))}
    for key, each in own.groups.items() if share.is_staged else ():
        largest = torch.tensor(list(each), dtype=torch.float64)
        found[key] = {LARGEST: Numbers(largest, torch.ones_like(largest))}
    return found


def kind_of(key: str) -> str:
    """Return which of :data:`KINDS` a key of numbers to be added is.

    Example:
        >>> kind_of("part of lm_head")
        'part of '
    """
    return next(kind for kind in KINDS if key.startswith(kind))


def placed(each: HeadSums, layer: str, share: RankShare) -> HeadSums:
    """Return sums of the heads here among those of all heads of a layer; 0 rows for the others."""
    if layer not in share.heads:
        return each
    fill = -torch.inf if each.signal.reduction == "max" else 0.0
    total = share.spread(layer, each.total, fill)
    return HeadSums(each.signal, total, share.spread(layer, each.count, 0.0))


def layout_of(own: Mapping[str, Mapping[str, Any]]) -> Layout:
    """Return the entries of what a rank has measured."""
    return [
        (layer, name, len(each.total))
        for layer, signals in own.items()
        for name, each in signals.items()
    ]
