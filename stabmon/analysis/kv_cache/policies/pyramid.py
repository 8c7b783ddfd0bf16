"""PyramidKV: SnapKV with more cache for the first layers than for the last."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from stabmon.analysis.kv_cache.checks import check_number
from stabmon.analysis.kv_cache.policies.snapkv import SnapKV
from stabmon.analysis.kv_cache.policy import POLICIES, Checks


@dataclass(frozen=True)
class Pyramid(SnapKV):
    """Budgets falling from first to last layer, SnapKV's keys.

    Args:
        pool: odd width of the average over neighbouring keys.
        steepness: the last layer gets ``1 / steepness`` of the mean, the first the complement to
            the right mean; 1 or above.

    Raises:
        ValueError: for values out of range.

    References:
        Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
        Funneling", 2024.
    """

    name: ClassVar[str] = "pyramid"

    checks: ClassVar[Checks] = SnapKV.checks | {"steepness": partial(check_number, least=1.0)}

    steepness: float = 20.0

    def fixed_claims(self, layers: int) -> list[float]:
        """Return claims from ``2 - 1/steepness`` down to ``1/steepness``."""
        last = 1.0 / self.steepness
        return [
            (2.0 - last) - (2.0 - 2.0 * last) * place / max(1, layers - 1)
            for place in range(layers)
        ]


POLICIES.register(Pyramid.name, Pyramid)
