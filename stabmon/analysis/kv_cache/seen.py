"""Summary of each layer after its prompt, for a choice once all layers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabmon.analysis.kv_cache import scores
from stabmon.analysis.kv_cache.cache.cascade import Cascade
from stabmon.analysis.kv_cache.cache.trace import Eviction
from stabmon.analysis.kv_cache.policies.h2o import H2O
from stabmon.analysis.kv_cache.policies.recency import Recency
from stabmon.analysis.kv_cache.policy import Policy, best
from stabmon.analysis.kv_cache.preservation import KeyTerms
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.analysis.kv_cache.report import LayerCache

COMPARED: tuple[Policy, ...] = (Recency(), H2O())
"""Policies for comparison; each chooses as many keys as the policy under test."""


@dataclass(frozen=True, eq=False)
class SeenLayer:
    """One layer after the prompt, linear in its length, on the CPU."""

    name: str
    lengths: list[int]
    dispersion: Tensor
    shift: Tensor
    claim: Tensor
    scores: Tensor
    rivals: dict[str, Tensor]
    terms: KeyTerms
    before: Tensor
    in_window: Tensor

    @classmethod
    def of(cls, layer: PromptLayer, policy: Policy) -> SeenLayer:
        """Summarize a layer while its attention is at hand.

        Args:
            layer: the layer's attention over the prompt.
            policy: scores its keys.
        """
        spread, change = scores.spread_and_change(layer)
        is_fixed = policy.fixed_claims(1) is not None
        claim = scores.preference(spread, change) if is_fixed else policy.claim(layer)
        terms = KeyTerms.of(layer)
        return cls(
            layer.name,
            layer.lengths,
            spread.cpu(),
            change.cpu(),
            claim.cpu().double(),
            policy.scores(layer).cpu(),
            {rival.name: rival.scores(layer).cpu() for rival in COMPARED},
            KeyTerms(terms.mass.cpu(), terms.entropy.cpu(), terms.variance.cpu()),
            layer.before.cpu(),
            layer.in_window.cpu(),
        )

    def choose(self, policy: Policy, budget: NDArray[np.int64]) -> Tensor:
        """Choose the remaining keys, ``[B, H_kv, S]`` bool, the window's included.

        Args:
            policy: makes the choice.
            budget: ``[B]`` keys before the window.
        """
        candidates = self.before[:, None].expand(self.scores.shape)
        return (
            policy.choose(self.scores, torch.from_numpy(budget), candidates)
            | self.in_window[:, None]
        )

    def report(
        self, budget: NDArray[np.int64], kept: Tensor, fed: int, lost: Sequence[Eviction]
    ) -> LayerCache:
        """Return the layer's part of the report.

        Args:
            budget: ``[B]`` keys before the window.
            kept: ``[B, H_kv, S]`` bool.
            fed: tokens fed after the prompt.
            lost: evictions of all layers; those of the prompt and of other layers are ignored.
        """
        before = self.before[:, None].expand(kept.shape)
        counts = (kept & before).sum(-1)
        window, valid = self.in_window[:, None], self.before | self.in_window
        choices = {"kept": kept}
        choices |= {
            name: best(values, counts, before) | window for name, values in self.rivals.items()
        }
        choices["best"] = self.terms.best_mass(kept, valid)
        gone = torch.where(kept, -1, 0).masked_fill(~valid[:, None], -2)
        gone = torch.nn.functional.pad(gone, (0, fed), value=-1).to(torch.int32)
        for eviction in lost:
            if eviction.layer == self.name and eviction.step:
                positions = torch.from_numpy(eviction.positions)
                index = torch.where(positions >= 0, positions, gone.shape[-1])
                gone = torch.nn.functional.pad(gone, (0, 1)).scatter_(-1, index, eviction.step)[
                    ..., :-1
                ]
        return LayerCache(
            layer=self.name,
            dispersion=self.dispersion,
            shift=self.shift,
            preference=self.claim,
            budget=torch.from_numpy(budget.copy()),
            scores=self.scores.masked_fill(~before, torch.nan),
            kept=positions_of(kept),
            preserved={name: self.terms.shares(chosen) for name, chosen in choices.items()},
            evicted_at=gone,
        )


def positions_of(kept: Tensor) -> Tensor:
    """Return the positions of the marked keys.

    Args:
        kept: ``[B, H_kv, S]`` bool.

    Returns:
        ``[B, H_kv, M]`` int64 ascending, -1 first where a row has fewer than M.

    Example:
        >>> positions_of(torch.tensor([[[True, False, True], [False, False, True]]])).tolist()
        [[[0, 2], [-1, 2]]]
    """
    place = torch.where(kept, torch.arange(kept.shape[-1], device=kept.device), -1).sort(-1).values
    return place[..., place.shape[-1] - max(1, int(kept.sum(-1).max())) :]


def stages_of(claims: NDArray[np.float64], cascade: Cascade) -> Tensor:
    """Return the budgets after each layer's turn, ``[L, L, B]`` int64.

    Entries of layers still to come are -1.

    Args:
        claims: ``[L, B]``.
        cascade: a new cascade, without any layer.
    """
    layers, batch = claims.shape
    stages = torch.full((layers, layers, batch), -1, dtype=torch.int64)
    for at, claim in enumerate(claims):
        stages[at, : at + 1] = torch.from_numpy(
            cascade.add(torch.from_numpy(np.ascontiguousarray(claim)))
        )
    return stages
