"""Sharing of the cache while the prompt goes through the layers.

After layer m has been prefilled, the *whole* cache is shared among the layers 0 … m, and every
earlier layer shrinks to its new share. The cache then never holds more than its final size and one
full layer; sharing after the last layer would hold all full layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stabmon.analysis.kv_cache.budgets import Rule


class Cascade:
    """Budgets of the layers prefilled so far, for each sample of a batch.

    Args:
        totals: keys before the window for all layers of a sample together, one number per sample.
        caps: keys before the window that a sample has, one number per sample.
        rule: see :mod:`stabmon.analysis.kv_cache.budgets`.

    Example:
        >>> import torch
        >>> from stabmon.analysis.kv_cache.budgets import filled
        >>> cascade = Cascade([12], [10], filled)
        >>> [cascade.add(torch.tensor([p])).tolist() for p in (1.0, 1.0, 2.0)]
        [[[10]], [[6], [6]], [[3], [3], [6]]]
    """

    def __init__(self, totals: Sequence[int], caps: Sequence[int], rule: Rule) -> None:
        self.totals, self.caps, self.rule = list(totals), list(caps), rule
        self.preferences: list[NDArray[np.float64]] = []
        self.stages: list[NDArray[np.int64]] = []
        """Budgets after each layer m, ``[m + 1, B]``."""

    def add(self, preference: Tensor) -> NDArray[np.int64]:
        """Give the next layer its share, at the cost of the earlier ones.

        Args:
            preference: ``[B]`` the layer's claim.

        Returns:
            ``[layers so far, B]`` int64. No budget ever grows, since an evicted key does not come
            back: a budget that the rule would raise stays.
        """
        self.preferences.append(preference.detach().cpu().double().numpy())
        budgets = allot(np.stack(self.preferences), self.totals, self.caps, self.rule)
        if self.stages:
            budgets[:-1] = np.minimum(budgets[:-1], self.stages[-1])
        self.stages.append(budgets)
        return budgets


def allot(
    preferences: NDArray[np.float64], totals: Sequence[int], caps: Sequence[int], rule: Rule
) -> NDArray[np.int64]:
    """Share each sample's cache among all layers at once.

    Args:
        preferences: ``[L, B]``.
        totals: keys to share, one number per sample.
        caps: the most that a layer can use, one number per sample.
        rule: see :mod:`stabmon.analysis.kv_cache.budgets`.

    Returns:
        ``[L, B]`` int64. A sample with a total for all its keys keeps them all.

    Example:
        >>> from stabmon.analysis.kv_cache.budgets import filled
        >>> allot(np.array([[1.0, 1.0], [2.0, 3.0]]), [6, 99], [10, 10], filled).tolist()
        [[2, 10], [4, 10]]
    """
    columns = [
        np.full(len(claims), cap, np.int64)
        if total >= cap * len(claims)
        else rule(claims, total, cap)
        for claims, total, cap in zip(preferences.T, totals, caps, strict=True)
    ]
    return np.stack(columns, axis=1)
