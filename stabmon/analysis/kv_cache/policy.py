"""Base class and registry of eviction policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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

Checks = dict[str, Callable[[str, Any], object]]
"""Range check of each parameter of a policy, called with its name and value."""


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One layer's attention while tokens are decoded.

    Q new queries attend to the M keys still in the cache.
    """

    operator: AttentionOperator
    positions: Tensor
    """``[B, H_kv, M]`` int64, ascending; -1 for empty slots, all at the start."""
    window: int
    memory: dict[str, Tensor]
    """Memory of the policy for each key, ``[B, H_kv, M]`` each; moves with the keys."""

    @property
    def key_heads(self) -> int:
        """Return the number of key heads, H_kv."""
        return self.positions.shape[1]

    @cached_property
    def weights(self) -> Tensor:
        """Compute the attention weights of the new queries, ``[B, H, Q, M]``."""
        cols, block = self.operator.probabilities_of(slice(0, self.operator.queries))
        return torch.nn.functional.pad(block, (cols.start, self.operator.keys - cols.stop))

    @property
    def safe(self) -> Tensor:
        """Return ``[M]`` bool: one of the newest ``window`` keys."""
        slots = self.positions.shape[2]
        return torch.arange(slots, device=self.positions.device) >= slots - self.window


@dataclass(frozen=True)
class Policy(ABC):
    """Strategy of choosing the keys of a cache.

    A policy defines each layer's claim on the cache, the worth of each key after the prompt, and
    its worth while decoding. The window's own keys always stay. Parameters of a policy are
    dataclass fields; ``checks`` holds a range check for each.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Oldest(Policy):
        ...     name = "oldest"
        ...     def scores(self, layer):
        ...         return -layer.valid.cumsum(1)[:, None].repeat(1, layer.key_heads, 1).float()
        >>> Oldest().fixed_claims(2), dict(Oldest().settings())
        ([1.0, 1.0], {})
    """

    name: ClassVar[str]
    checks: ClassVar[Checks] = {}
    """Range check of each parameter."""
    evicts_in_decode: ClassVar[bool] = True
    """Whether the published method also evicts while decoding; else its cache grows."""
    keeps_all: ClassVar[bool] = False
    """True if nothing is ever evicted."""
    follows: ClassVar[bool] = False
    """True if the policy reads every decoding step, even one without eviction."""

    def __post_init__(self) -> None:
        for name, check in self.checks.items():
            check(name, getattr(self, name))

    @property
    def rule(self) -> Rule:
        """Return the rule from claims to budgets."""
        return filled

    def fixed_claims(self, layers: int) -> list[float] | None:
        """Return the layers' claims if they are known before the prompt, else None.

        Args:
            layers: number of layers that share the cache.

        Returns:
            One number of 0 or above per layer; by default all layers alike.
        """
        return [1.0] * layers

    def claim(self, layer: PromptLayer) -> Tensor:
        """Return a layer's claim on the cache, ``[B]``, 0 or above.

        Called if :meth:`fixed_claims` is None. Alike by default.
        """
        return torch.ones(layer.operator.batch)

    @abstractmethod
    def scores(self, layer: PromptLayer) -> Tensor:
        """Return the worth of each key after the prompt, ``[B, H_kv, S]``.

        Entries of keys not before the window are ignored, and may be NaN.
        """

    def choose(self, scores: Tensor, budget: Tensor, candidates: Tensor) -> Tensor:
        """Choose the remaining keys before the window.

        Args:
            scores: ``[B, H_kv, M]``.
            budget: ``[B]`` int64 keys for each key head.
            candidates: ``[B, H_kv, M]`` bool, the keys to choose from.

        Returns:
            ``[B, H_kv, M]`` bool; of two keys of equal worth the earlier stays.
        """
        return best(scores, budget[:, None].expand(scores.shape[:2]), candidates)

    def remember(self, layer: PromptLayer) -> dict[str, Tensor]:
        """Return the policy's memory of each key for decoding, ``[B, H_kv, S]`` each."""
        return {}

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Return the worth of each cached key at a decoding step, ``[B, H_kv, M]``.

        The newest window stays whatever its worth. By default the worth is the attention of the new
        queries, averaged over neighbours by position and over the group's heads.
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
        count: ``[...]`` int64; a number above that of the candidates marks them all.
        candidates: ``[..., M]`` bool.

    Returns:
        ``[..., M]`` bool; the earlier of two equal ones is marked.

    Example:
        >>> candidates = torch.tensor([True, False, True, True])
        >>> best(torch.tensor([3.0, 9.0, 3.0, 5.0]), torch.tensor(2), candidates).tolist()
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
"""Eviction policies by name.

Other packages add theirs by an entry point in ``stabmon.evictions``.
"""


def policy_of(policy: str | Policy) -> Policy:
    """Return a policy; a name makes one with its defaults.

    Args:
        policy: a registered name, or a policy.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> policy_of("snapkv").name
        'snapkv'
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise ValueError(f"policy {policy!r}: give one of {', '.join(POLICIES)}, or a Policy")
    return POLICIES[policy]()
