"""H2O: keys stay by the sum of all attention received so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stabmon.analysis.kv_cache.policy import POLICIES, DecodeStep, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.analysis.kv_cache.scores import over_groups


@dataclass(frozen=True)
class H2O(Policy):
    """Keys with the largest attention mass so far, and the newest.

    The sums over all queries of the prompt are one transposed product with the attention, linear in
    its length. Early keys are seen by more queries than late ones, and the method does not correct
    for it. While decoding, the sums keep growing.

    References:
        Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
        Models", 2023.
    """

    name: ClassVar[str] = "h2o"
    follows: ClassVar[bool] = True

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return the mass received by each key, ``[B, H_kv, S]``, averaged over the group."""
        return over_groups(layer.received, layer.key_heads)

    def remember(self, layer: PromptLayer) -> dict[str, Tensor]:
        """Return the masses, for decoding to continue."""
        return {"received": self.scores(layer)}

    def step_scores(self, step: DecodeStep) -> Tensor:
        """Add the new queries' attention and return the sums, ``[B, H_kv, M]``."""
        step.memory["received"] += over_groups(step.weights.sum(2), step.key_heads)
        return step.memory["received"]


POLICIES.register(H2O.name, H2O)
