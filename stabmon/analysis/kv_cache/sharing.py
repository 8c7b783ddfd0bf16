"""How the samples of a batch share their caches among layers, while layers are prefilled or once
all are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stabmon.analysis.kv_cache.budgets import tokens_of
from stabmon.analysis.kv_cache.cache.cascade import Cascade, allot
from stabmon.analysis.kv_cache.checks import check_sizes
from stabmon.analysis.kv_cache.policy import Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer

_ENOUGH = 10**9


class Sharing:
    """One batch's cache and the layers that share it.

    Args:
        policy: whose claims and rule count.
        lengths: tokens of each sample's prompt.
        cache_size: tokens, or a share of each sample's prompt.
        window: newest keys that always stay.
        layers: how many layers share.

    Attributes:
        sizes: keys that each sample may keep in a layer, on average over layers.
        totals: keys before the window for all layers of a sample together; a sample that fits has
            enough.
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
        self.totals = [_ENOUGH if n <= size else (size - window) * layers for n, size in pairs]
        self.caps = [max(0, n - window) for n in lengths]
        self.cascade = Cascade(self.totals, self.caps, policy.rule)

    def add(self, layer: PromptLayer, *, at_once: bool) -> dict[int, NDArray[np.int64]]:
        """Let the next layer claim its share.

        Args:
            layer: which has just been prefilled.
            at_once: share the whole cache among the layers so far, else when all have claimed.

        Returns:
            Budgets ``[B]`` of the layers that now have to shrink, by their place in the order of
            the prefill.
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
        """Return the claims ``[L, B]`` of a policy that knows them beforehand."""
        claims = self.policy.fixed_claims(self.layers)
        assert claims is not None
        return np.repeat(np.asarray(claims, np.float64)[:, None], len(self.lengths), axis=1)

    def one_shot(self, claims: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the budgets ``[L, B]`` of all layers at once."""
        return allot(claims, self.totals, self.caps, self.policy.rule)
