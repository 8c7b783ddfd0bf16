"""Attention preserved by the kept keys, against other choices of as many keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.policy import best
from stabmon.analysis.kv_cache.prompt import PromptLayer

MEASURES = ("mass", "entropy", "variance")
"""Measures of the preserved attention, each in [0, 1].

``mass``: the share of the window queries' attention that rests on kept keys, over all keys, the
window's own included. ``entropy``: the share of the dispersion D that kept keys contribute.
``variance``: the share of the shift V. The last two, like D and V, are over keys before the window,
and NaN where D or V is 0. Each is summed over heads before the division.
"""


@dataclass(frozen=True, eq=False)
class KeyTerms:
    """Contribution of each key to each measure, ``[B, H, S]``, to judge any choice."""

    mass: Tensor
    entropy: Tensor
    variance: Tensor

    @classmethod
    def of(cls, layer: PromptLayer) -> KeyTerms:
        """Return the terms of one layer."""
        weights, outside = layer.weights, ~layer.before[:, None]
        entropy = -torch.xlogy(weights, weights).sum(2).masked_fill(outside, 0.0)
        return cls(weights.mean(2), entropy, weights.var(2, correction=1).masked_fill(outside, 0.0))

    def shares(self, kept: Tensor) -> dict[str, Tensor]:
        """Return the share of each measure on the kept keys.

        Args:
            kept: ``[B, H_kv, S]`` bool.

        Returns:
            ``[B]`` float64 by the names of :data:`MEASURES`.
        """
        found = {}
        for name in MEASURES:
            terms: Tensor = getattr(self, name)
            chosen = kept.repeat_interleave(terms.shape[1] // kept.shape[1], dim=1)
            part = (terms * chosen).sum((1, 2), dtype=torch.float64)
            found[name] = (part / terms.sum((1, 2), dtype=torch.float64)).cpu()
        return found

    def best_mass(self, kept: Tensor, valid: Tensor) -> Tensor:
        """Choose as many keys in each head with the most mass, ``[B, H_kv, S]`` bool.

        Args:
            kept: ``[B, H_kv, S]`` bool; only its number of keys per head counts.
            valid: ``[B, S]`` bool, the candidates.
        """
        mass = self.mass.unflatten(1, (kept.shape[1], -1)).sum(2)
        return best(mass, kept.sum(-1), valid[:, None].expand_as(kept))
