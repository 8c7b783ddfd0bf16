"""Budgets of a batch's layers, shared during the prefill or after it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stabmon.analysis.kv_cache.budgets import tokens_of
from stabmon.analysis.kv_cache.cache.cascade import Cascade, allot
from stabmon.analysis.kv_cache.checks import check_sizes
from stabmon.analysis.kv_cache.policy import Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer

_UNLIMITED = 10**9


class Sharing:
    """One batch's cache and its division among layers.

    Args:
        policy: its claims and its rule decide.
        lengths: tokens of each sample's prompt.
        cache_size: tokens, or a share of each sample's prompt.
        window: number of newest keys, which always stay.
        layers: number of layers.

    Attributes:
        sizes: keys that each sample may keep in a layer, on average over layers.
        totals: keys before the window for all layers of a sample together; unlimited for a sample
            that fits whole.
        caps: keys before the window that a sample has.

    Raises:
        ValueError: if a sample's cache has no room beside the window.
    """

    def __init__(
        self, policy: Policy, lengths: list[int], cache_size: int | float, window: int, layers: int
    ) -> None:
        self.policy, self.lengths, self.layers = policy, lengths, layers
        self.sizes = list(lengths) if policy.keeps_all else tokens_of(cache_size, lengths)
        check_sizes(self.sizes, lengths, window)
        pairs = list(zip(lengths, self.sizes, strict=True))
        self.totals = [_UNLIMITED if n <= size else (size - window) * layers for n, size in pairs]
        self.caps = [max(0, n - window) for n in lengths]
        self.cascade = Cascade(self.totals, self.caps, policy.rule)

    def add(self, layer: PromptLayer, *, at_once: bool) -> dict[int, NDArray[np.int64]]:
        """Add the next layer's claim and return the budgets of all layers to shrink.

        Args:
            layer: the layer that was just prefilled.
            at_once: share the whole cache among the layers so far; else wait for the last claim.

        Returns:
            Budgets ``[B]`` by the layer's place in the order of the prefill.
        """
        place = len(self.cascade.preferences)
        fixed = self.policy.fixed_claims(self.layers)
        if fixed is not None:
            self.cascade.preferences.append(np.full(len(self.lengths), fixed[place]))
            return {place: self.one_shot(self.fixed())[place]}
        budgets = self.cascade.add(self.policy.claim(layer))
        if at_once:
            return dict(enumerate(budgets))
        is_last = place + 1 == self.layers
        return dict(enumerate(self.one_shot(np.stack(self.cascade.preferences)))) if is_last else {}

    def fixed(self) -> NDArray[np.float64]:
        """Return the claims ``[L, B]`` of a policy with fixed claims."""
        claims = self.policy.fixed_claims(self.layers)
        assert claims is not None
        return np.repeat(np.asarray(claims, np.float64)[:, None], len(self.lengths), axis=1)

    def one_shot(self, claims: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the budgets ``[L, B]`` of all layers, from their claims ``[L, B]``."""
        return allot(claims, self.totals, self.caps, self.policy.rule)
