"""SnapKV: every layer alike, keys stay by the window's mean attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stabmon.analysis.kv_cache.checks import check_pool
from stabmon.analysis.kv_cache.policy import POLICIES, Checks, Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.analysis.kv_cache.scores import keep_scores


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keys with the most attention of the prompt's last queries.

    Args:
        pool: odd width of the average over neighbouring keys.

    Raises:
        ValueError: for a width that is even or below 1.

    References:
        Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024.
    """

    name: ClassVar[str] = "snapkv"
    evicts_in_decode: ClassVar[bool] = False
    checks: ClassVar[Checks] = {"pool": check_pool}

    pool: int = 5

    def scores(self, layer: PromptLayer) -> Tensor:
        """Return the window's mean attention, pooled, ``[B, H_kv, S]``."""
        return keep_scores(layer.weights, layer.before, layer.key_heads, gamma=0.0, pool=self.pool)


POLICIES.register(SnapKV.name, SnapKV)
