"""CAKE: layers share the cache by their preference, keys stay by mean and variance of the window's
attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stabmon.analysis.kv_cache import scores
from stabmon.analysis.kv_cache.budgets import Rule, allotment_rule
from stabmon.analysis.kv_cache.checks import check_number, check_pool
from stabmon.analysis.kv_cache.policy import POLICIES, DecodeStep, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True)
class Cake(Policy):
    """Evict as CAKE does, with positions kept ascending and everything in float32.

    While decoding, the new query's attention alone decides, pooled over neighbouring positions (the
    published code pools over keys in the order of their scores, which smears unrelated keys into
    each other).

    Args:
        tau1, tau2: positive temperatures of dispersion and shift.
        gamma: weight of the variance in a key's score, 0 or above.
        pool: odd width of the average over neighbouring keys.
        allotment: ``filled`` or ``published``, see :mod:`stabmon.analysis.kv_cache.budgets`.

    Raises:
        ValueError: for values out of range.

    References:
        Qin et al., ICLR 2025.
    """

    name: ClassVar[str] = "cake"

    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0
    pool: int = 5
    allotment: str = "filled"

    def __post_init__(self) -> None:
        check_number("tau1", self.tau1, above=0.0)
        check_number("tau2", self.tau2, above=0.0)
        check_number("gamma", self.gamma, least=0.0)
        check_pool(self.pool)
        allotment_rule(self.allotment)

    @property
    def rule(self) -> Rule:
        """The allotment that was asked for."""
        return allotment_rule(self.allotment)

    def fixed_claims(self, layers: int) -> None:
        """Return None: claims come of the prompt."""

    def claim(self, layer: PromptLayer) -> Tensor:
        """Return the preference ``D^(1/tau1) V^(1/tau2)``, ``[B]``."""
        spread, change = (
            scores.dispersion(layer.weights, layer.before),
            scores.shift(layer.weights, layer.before),
        )
        return scores.preference(spread, change, self.tau1, self.tau2)

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return mean and variance of the window's attention, ``[B, H_kv, S]``."""
        key_heads = layer.key_heads
        return scores.keep_scores(
            layer.weights, layer.before, key_heads, gamma=self.gamma, pool=self.pool
        )

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Return the new queries' mean attention, pooled, ``[B, H_kv, M]``."""
        mean = step.weights.mean(2).masked_fill(step.safe, 0.0)
        return scores.over_groups(scores.pooled(mean, self.pool), step.key_heads)


POLICIES.register(Cake.name, Cake)
