"""CAKE: layers share the cache by preference, keys stay by the window's attention.

A key's worth is mean and variance of the window's attention to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from stabmon.analysis.kv_cache import scores
from stabmon.analysis.kv_cache.budgets import Rule, allotment_rule
from stabmon.analysis.kv_cache.checks import check_number, check_pool
from stabmon.analysis.kv_cache.policy import POLICIES, Checks, DecodeStep, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True)
class Cake(Policy):
    """Eviction by the mean and the variance of attention.

    Positions are kept ascending, and everything is in float32.

    While decoding, the new query's attention alone decides, pooled over neighbouring positions (the
    published code pools over keys in the order of their scores, which mixes unrelated keys).

    Args:
        tau1, tau2: positive temperatures of dispersion and shift.
        gamma: weight of the variance in a key's score, 0 or above.
        pool: odd width of the average over neighbouring keys.
        allotment: ``filled`` or ``published``, see :mod:`stabmon.analysis.kv_cache.budgets`.

    Raises:
        ValueError: for values out of range.

    References:
        Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", ICLR
        2025.
    """

    name: ClassVar[str] = "cake"
    checks: ClassVar[Checks] = {
        "tau1": partial(check_number, above=0.0),
        "tau2": partial(check_number, above=0.0),
        "gamma": partial(check_number, least=0.0),
        "pool": check_pool,
        "allotment": lambda _, value: allotment_rule(value),
    }

    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0
    pool: int = 5
    allotment: str = "filled"

    @property
    def rule(self) -> Rule:
        """Return the chosen allotment rule."""
        return allotment_rule(self.allotment)

    def fixed_claims(self, layers: int) -> None:
        """Return None: claims depend on the prompt."""

    def claim(self, layer: PromptLayer) -> Tensor:
        """Return the preference ``D^(1/tau1) V^(1/tau2)``, ``[B]``."""
        return scores.preference(*scores.spread_and_change(layer), self.tau1, self.tau2)

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
