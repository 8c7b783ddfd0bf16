"""The gradient of the whole model is far above its own past."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, NonNegative, Positive, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.baselines import loss_rose
from stabmon.rules.evidence.robust_stats import robust_spread
from stabmon.rules.symptoms import LOSS, Symptom
from stabmon.rules.tracking.history import History


@rule
@renamed(stays="persistence", least_past="min_history")
@dataclass(frozen=True)
class GradientExplosion(Rule):
    """The norm of the whole model's gradient has left its own recent range upwards, and stays
    there.

    A single large gradient is common in healthy runs (up to 14 times the recent median in our own)
    and clipping makes it harmless: a warning. An alarm is a gradient far beyond its range for
    ``persistence`` readings in a row while the loss rises: then steps of the wrong size or
    direction are being taken. Blames no head; the layer that grew most is in the evidence.
    """

    symptom: ClassVar[Symptom] = LOSS

    deviations: NonNegative = 6.0
    """Spreads of the log norm above its recent median."""
    warning: Positive = 10.0
    """Times the recent median that the norm must also be."""
    error: Positive = 10.0
    """Times the recent median that the norm must be for ``persistence`` readings, with a rising
    loss, for an alarm.
    """
    persistence: Count = 3
    """Readings."""
    past: Count = 50
    """Readings that make up the recent range."""
    min_history: Count = 12
    """Readings that must be known before any is judged."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """At most one issue, for the run; a norm that is NaN or inf is left to ``non_finite``."""
        norms = history.gradients("")
        if (
            len(norms) < self.min_history + self.persistence
            or not np.isfinite(norms[-1])
            or norms[-1] <= 0
        ):
            return []
        past, newest = (
            _log(norms[-self.past - self.persistence : -self.persistence]),
            _log(norms[-self.persistence :]),
        )
        past = past[np.isfinite(past)]
        if len(past) < self.min_history:
            return []
        middle, spread = float(np.median(past)), float(robust_spread(past[:, None])[0])
        wide = middle + self.deviations * spread
        level = max(wide, middle + np.log(self.warning))
        if newest[-1] < level and not (
            history.is_open_at("gradient_explosion") and newest[-1] >= level - np.log(2)
        ):
            return []
        high = bool((newest >= max(wide, middle + np.log(self.error))).all())
        error = high and loss_rose(history, self.persistence)
        layers = {
            layer: _growth(history.gradients(layer), self.persistence)
            for layer in history.latest.gradients
            if layer
        }
        most = max(
            layers, key=lambda layer: np.nan_to_num(layers[layer], nan=-np.inf), default=None
        )
        return [
            StabilityIssue(
                step=history.latest.step,
                layer=None,
                head=None,
                issue_type="gradient_explosion",
                severity="error" if error else "warning",
                value=float(norms[-1]),
                threshold=float(np.exp(level)),
                suggestion=(
                    "Clip the gradient norm near its recent median, and look at the batch; if it "
                    "comes back, lower the rate or go back "
                    "to a checkpoint before it."
                ),
                evidence={
                    "recent_median": float(np.exp(middle)),
                    "recent_log_spread": spread,
                    "stays": high,
                    "layer_grown_most": most,
                },
            )
        ]


def _log(norms: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        out: np.ndarray = np.where(norms > 0, np.log(norms), np.nan)
    return out


def _growth(norms: np.ndarray, newest: int) -> float:
    """Newest log norm over the median of the ones before the ``newest``."""
    past = _log(norms[:-newest])
    past = past[np.isfinite(past)]
    return float(_log(norms[-1:])[0] - np.median(past)) if len(past) else float("nan")
