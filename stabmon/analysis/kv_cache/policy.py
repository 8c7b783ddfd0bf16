"""What an eviction policy is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.budgets import Rule, filled
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.analysis.kv_cache.scores import over_groups, pooled
from stabmon.operator import AttentionOperator
from stabmon.registry import Registry


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One layer's attention while tokens are decoded: Q new queries over the M keys that the cache
    still holds.
    """

    operator: AttentionOperator
    positions: Tensor
    """``[B, H_kv, M]`` int64, ascending; -1 for an empty slot, all of which come first."""
    window: int
    memory: dict[str, Tensor]
    """The policy's memory of each key, ``[B, H_kv, M]`` each; moves with the keys."""

    @property
    def key_heads(self) -> int:
        """H_kv."""
        return self.positions.shape[1]

    @cached_property
    def weights(self) -> Tensor:
        """``[B, H, Q, M]`` attention weights of the new queries."""
        cols, block = self.operator.probabilities_of(slice(0, self.operator.queries))
        return torch.nn.functional.pad(block, (cols.start, self.operator.keys - cols.stop))

    @property
    def safe(self) -> Tensor:
        """``[M]`` bool: the newest ``window`` keys."""
        slots = self.positions.shape[2]
        return torch.arange(slots, device=self.positions.device) >= slots - self.window


@dataclass(frozen=True)
class Policy(ABC):
    """Decides which keys of a cache stay.

    A policy says what each layer claims of the cache, what each key is worth after the prompt, and
    what it is worth while decoding. The window's own keys always stay.
    """

    name: ClassVar[str]
    evicts_in_decode: ClassVar[bool] = True
    """True where the published method also evicts while decoding; else its cache grows with every
    token.
    """
    keeps_all: ClassVar[bool] = False
    """True where nothing is ever evicted."""
    follows: ClassVar[bool] = False
    """True where the policy reads every decoding step, even one without eviction."""

    @property
    def rule(self) -> Rule:
        """Return the rule that turns claims into budgets."""
        return filled

    def fixed_claims(self, layers: int) -> list[float] | None:
        """Return the layers' claims where they are known before the prompt, else None.

        Args:
            layers: how many layers share the cache.

        Returns:
            One number of 0 or above a layer; by default all layers alike.
        """
        return [1.0] * layers

    def claim(self, layer: PromptLayer) -> Tensor:
        """Return a layer's claim on the cache, ``[B]``, 0 or above; asked where
        :meth:`fixed_claims` is None. Alike by default.
        """
        return torch.ones(layer.operator.batch)

    @abstractmethod
    def scores(self, layer: PromptLayer) -> Tensor:
        """Return what each key is worth after the prompt, ``[B, H_kv, S]``; NaN, or anything, for
        keys not before the window.
        """

    def choose(self, scores: Tensor, budget: Tensor, candidates: Tensor) -> Tensor:
        """Return the keys before the window that stay.

        Args:
            scores: ``[B, H_kv, M]``.
            budget: ``[B]`` int64 keys to each key head.
            candidates: ``[B, H_kv, M]`` bool, of which to choose.

        Returns:
            ``[B, H_kv, M]`` bool; the earlier key wins where two are worth the same.
        """
        return best(scores, budget[:, None].expand(scores.shape[:2]), candidates)

    def remember(self, layer: PromptLayer) -> dict[str, Tensor]:
        """Return what the policy will want to know of each key while decoding, ``[B, H_kv, S]``
        each.
        """
        return {}

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Return what each key in the cache is worth at a decoding step, ``[B, H_kv, M]``; the
        newest window stays anyhow.

        By default the attention of the new queries, averaged over neighbours by position and over
        the group's heads.
        """
        return over_groups(
            pooled(step.weights.mean(2).masked_fill(step.safe, 0.0), 5), step.key_heads
        )

    def settings(self) -> Mapping[str, Any]:
        """Return the policy's own parameters by name."""
        return dict(vars(self))


def best(scores: Tensor, count: Tensor, candidates: Tensor) -> Tensor:
    """Mark the ``count`` candidates with the highest scores in each row.

    Args:
        scores: ``[..., M]``.
        count: ``[...]`` int64; more than there are candidates marks them all.
        candidates: ``[..., M]`` bool.

    Returns:
        ``[..., M]`` bool; the earlier of two equal ones is marked.

    Example:
        >>> best(torch.tensor([3.0, 9.0, 3.0, 5.0]), torch.tensor(2), torch.tensor([True, False, True, True])).tolist()
        [True, False, False, True]
    """
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # two stable sorts: by score, then candidates first
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    first = (
        candidates.gather(-1, order).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    )
    order = order.gather(-1, first)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return (rank < count[..., None]) & candidates


POLICIES = Registry[type[Policy]]("eviction", package="stabmon.analysis.kv_cache.policies")
"""Eviction policies by name; other packages add theirs by an entry point in
``stabmon.evictions``.
"""


def policy_of(policy: str | Policy) -> Policy:
    """Return a policy, made with its defaults where only its name is given.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> policy_of("snapkv").name
        'snapkv'
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise ValueError(f"policy {policy!r}: give a name of {', '.join(POLICIES)}, or a Policy")
    return POLICIES[policy]()
