"""Chance that attention damages a run: a logistic model of monotone pieces."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np

from stabmon.risk.features import layer_features
from stabmon.rules.tracking.history import History

MARGINS = (-0.5, 1.5)
"""Range that a piece is clipped to: half its width below ``low`` and above ``high``."""


@dataclass(frozen=True)
class Piece:
    """Contribution of one feature: 0 at ``low``, ``weight`` at ``high``, linear between."""

    feature: str
    """Name in :data:`~stabmon.risk.features.FEATURES`."""
    low: float
    """Median of the feature in healthy runs."""
    high: float
    """98th percentile of the feature, failing runs before their onset included."""
    weight: float
    """Log-odds added at ``high``; not below 0."""

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return the log-odds that the feature adds; 0 where it is unknown.

        Args:
            values: the feature's values, of any shape.

        Example:
            >>> Piece("sat10", 0.0, 0.5, 2.0).of(np.array([0.25, 5.0, np.nan])).tolist()
            [1.0, 3.0, 0.0]
        """
        share = np.clip((values - self.low) / (self.high - self.low), *MARGINS)
        return self.weight * np.where(np.isfinite(values), share, 0.0)


@dataclass(frozen=True)
class RiskModel:
    """Risk of a layer, fitted on runs with known outcomes.

    Log-odds are ``slope * (bias + sum of pieces) + offset``; slope and offset calibrate the largest
    of a run's readings to the share of runs that failed by attention.
    """

    pieces: tuple[Piece, ...]
    bias: float
    slope: float
    offset: float
    thresholds: Mapping[float, float]
    """Risk from which a layer alarms, by the share of healthy runs that it alarms in."""
    source: str = ""
    """Runs that it was fitted on, in words."""

    def contributions(self, history: History) -> dict[str, np.ndarray]:
        """Return ``[L]`` log-odds that each feature adds at the newest reading, by name.

        Args:
            history: at least one reading, with L attention layers.

        Example:
            >>> from stabmon.records import Reading
            >>> history = History()
            >>> history.add(Reading(1, None, {"attn": {"normalized_entropy": np.array([0.1])}}))
            >>> bool(load_risk_model().contributions(history)["entropy_lost"] > 0)
            True
        """
        found = layer_features(history)
        return {each.feature: each.of(found[each.feature]) for each in self.pieces}

    def probability(self, contributions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return ``[L]`` chances, in [0, 1].

        Args:
            contributions: see :meth:`contributions`.

        Example:
            >>> model = RiskModel((), 0.0, 1.0, 0.0, {0.05: 0.5})
            >>> model.probability({"sat10": np.array([0.0, 2.0])}).round(2).tolist()
            [0.5, 0.88]
        """
        total = self.bias + sum(contributions.values(), start=np.float64(0.0))
        chance: np.ndarray = 1 / (1 + np.exp(-(self.slope * total + self.offset)))
        return chance

    def threshold(self, false_alarm_rate: float) -> float:
        """Return the risk from which a layer alarms.

        Args:
            false_alarm_rate: share of healthy runs that may alarm, in (0, 1).

        Returns:
            Interpolated between the fitted rates, and held at the outermost of them.

        Example:
            >>> RiskModel((), 0.0, 1.0, 0.0, {0.02: 0.8, 0.1: 0.4}).threshold(0.06)
            0.6
        """
        rates = sorted(self.thresholds)
        levels = [self.thresholds[rate] for rate in rates]
        return round(float(np.interp(false_alarm_rate, rates, levels)), 12)

    def to_dict(self) -> dict[str, Any]:
        """Return the model as plain values, as it is stored.

        Example:
            >>> RiskModel.from_dict(load_risk_model().to_dict()) == load_risk_model()
            True
        """
        return asdict(self) | {"thresholds": {str(k): v for k, v in self.thresholds.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RiskModel:
        """Return the model of :meth:`to_dict`.

        Args:
            data: plain values.

        Raises:
            ValueError: if a field is missing or of the wrong type.
        """
        try:
            return cls(
                tuple(Piece(**each) for each in data["pieces"]),
                float(data["bias"]),
                float(data["slope"]),
                float(data["offset"]),
                {float(rate): float(level) for rate, level in data["thresholds"].items()},
                str(data.get("source", "")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no risk model: {error}") from error


@functools.cache
def load_risk_model() -> RiskModel:
    """Return the model that comes with the package, fitted by ``tests/bench/fit_risk.py``.

    Example:
        >>> 0 < load_risk_model().threshold(0.05) < 1
        True
    """
    text = resources.files("stabmon.risk").joinpath("model.json").read_text(encoding="utf-8")
    return RiskModel.from_dict(json.loads(text))
