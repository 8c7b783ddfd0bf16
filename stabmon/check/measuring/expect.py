"""The attention expected from a layer's weights beside the measured one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stabmon.check.measuring.arithmetic import critical_spread, expected_entropy, expected_maximum
from stabmon.check.measuring.observe import Observation
from stabmon.check.measuring.weights import HeadWeights, head_weights
from stabmon.records import LayerInfo


@dataclass(frozen=True, eq=False)
class LayerView:
    """One attention layer, expected and measured.

    H query heads; arrays are float64 ``[H]``.
    """

    layer: str
    info: LayerInfo
    keys: int
    """Keys visible to a row at the length to train at."""
    limited: bool
    """True where a window, not the length, sets ``keys``."""
    measured: Mapping[str, np.ndarray]
    weights: HeadWeights | None
    unknown: str
    """Reason for missing weights."""
    scale: float
    """Effective factor of the scores.

    Includes a scaling of queries before the product; the call's own factor where unknown.
    """
    input_size: float
    """Root mean square of the projections' inputs, as keys show it; NaN where unknown."""

    @property
    def biased(self) -> bool:
        """Return whether a position bias is, or may have been, added to scores.

        It may have been where only scores were seen.
        """
        return bool(self.measured["biased"].any())

    @property
    def untrained(self) -> bool | None:
        """Return whether the weights look random; None where they are unknown."""
        return None if self.weights is None else self.weights.untrained

    @property
    def expected_spread(self) -> np.ndarray:
        """Return the standard deviation ``[H]`` of scores expected from the weights.

        For inputs of unit mean square without correlations; NaN where unknown.
        """
        if self.weights is None:
            return np.full(self.info.heads, np.nan)
        spread: np.ndarray = abs(self.scale) * self.weights.product
        return spread

    @property
    def spread(self) -> np.ndarray:
        """Return the standard deviation ``[H]`` of a row's scores, measured if possible."""
        measured = self.measured["score_spread"]
        return np.where(np.isfinite(measured), measured, self.expected_spread)

    @property
    def critical(self) -> float:
        """Return the critical spread of rows of this length."""
        return critical_spread(self.keys)

    @property
    def widest(self) -> int:
        """Return the head with the largest spread."""
        return int(np.nanargmax(self.spread)) if np.isfinite(self.spread).any() else 0

    @property
    def expected_share(self) -> float:
        """Return the expected entropy of the widest head's rows over ln n, in [0, 1]."""
        sigma = float(self.spread[self.widest])
        return (
            expected_entropy(sigma, self.keys, self.info.softcap) / math.log(max(self.keys, 2))
            if math.isfinite(sigma)
            else math.nan
        )

    @property
    def expected_max(self) -> float:
        """Return the largest score to expect of a row of this length.

        From the spread for random weights, as measured for trained ones.
        """
        measured = float(np.nanmax(self.measured["max_logit"], initial=-math.inf))
        if self.untrained and np.isfinite(self.expected_spread).all():
            return expected_maximum(float(self.expected_spread.max()), self.keys)
        return measured

    @property
    def largest_product(self) -> np.ndarray:
        """Return the largest measured ``q·k`` before scaling, ``[H]``."""
        return (
            self.measured["max_logit"] / self.info.scale
            if self.info.scale > 0
            else np.full(self.info.heads, np.nan)
        )


def layer_views(seen: Observation, length: int | None) -> list[LayerView]:
    """Return one view per layer, in the order of the forward.

    Args:
        seen: the measurements.
        length: the length to train at in tokens; None for the sample's own.
    """
    views = []
    for layer, measured in seen.layers.items():
        info, module = seen.info[layer], seen.modules.get(layer)
        weights = head_weights(module, info)
        known = weights if isinstance(weights, HeadWeights) else None
        before, size = _effective_scale(known, measured)
        limited = seen.visible[layer] < seen.keys[layer]
        keys = seen.visible[layer]
        if length is not None:
            keys = min(length, keys) if limited else length
        views.append(
            LayerView(
                layer=layer,
                info=info,
                keys=keys,
                limited=limited,
                measured=measured,
                weights=known,
                unknown="" if known is not None else str(weights),
                scale=info.scale * before,
                input_size=size,
            )
        )
    return views


def _effective_scale(
    weights: HeadWeights | None, measured: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Return the factor of queries before the product, and the inputs' size."""
    if weights is None or "key_size" not in measured:
        return 1.0, math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        key = float(np.nanmedian(measured["key_size"] / weights.key_size))
        query = float(np.nanmedian(measured["query_size"] / weights.query_size))
    if not (math.isfinite(key) and math.isfinite(query)) or key <= 0:
        return 1.0, math.nan
    before = query / key
    return (before if before < 0.7 or before > 1.4 else 1.0), math.nan if weights.normed else key
