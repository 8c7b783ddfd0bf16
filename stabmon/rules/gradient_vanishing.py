"""An attention layer stopped receiving gradient because its rows saturated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.context import advice
from stabmon.rules.evidence.robust_stats import median
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History


@rule
@renamed(least_past="min_history")
@dataclass(frozen=True)
class GradientVanishing(Rule):
    """The gradient of one layer's attention collapsed against its own past and against the model's,
    while its rows saturated.

    The gradient that reaches a row's scores is at most lambda times that which reaches its
    probabilities, and lambda, the largest eigenvalue of the softmax's Jacobian, goes to zero as a
    row turns one-hot. So a layer whose share of the model's gradient fell to ``error``, with most
    rows saturated that were not before, can no longer learn where to attend: an alarm. A fall
    without saturated rows has another cause (frozen parameters, a closing gate): a warning. A
    layer's value and output weights still receive gradient when its rows saturate, so this comes
    late; ``logit_growth`` comes first.
    """

    symptom: ClassVar[Symptom] = SCORES

    warning: Fraction = 0.02
    """Share of its own past share of the model's gradient norm at which a layer is worth a look."""
    error: Fraction = 0.05
    """The same for an alarm, where rows saturated as well."""
    saturated: Fraction = 0.5
    """Mean share of saturated rows over the layer's heads that an alarm needs."""
    rise: Fraction = 0.25
    """How much of it must have come since the past that the gradient is measured against."""
    past: Count = 64
    """Readings whose older half is the past."""
    min_history: Count = 12
    """Readings that must be known before any is judged."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a layer; ``value`` is its share of the model's gradient over what that share
        was.
        """
        layers = [layer for layer in history.latest.gradients if layer]
        if len(history) < self.min_history + 2 or not layers:
            return
        own = np.stack([history.gradients(layer)[-self.past :] for layer in layers], axis=1)
        whole = history.gradients("")[-self.past :, None]
        older = slice(0, max(self.min_history, len(own) // 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where((whole > 0) & np.isfinite(whole), own / whole, np.nan)
            kept, fell = (
                median(share[-2:]) / median(share[older]),
                median(own[-2:]) / median(own[older]),
            )
        low = np.maximum(kept, fell)  # both must have collapsed
        for n in np.flatnonzero(low <= max(self.error, 2 * self.warning)).tolist():
            yield from self._judge(history, layers[n], float(kept[n]), float(fell[n]), older)

    def _judge(
        self, history: History, layer: str, kept: float, fell: float, older: slice
    ) -> Iterable[StabilityIssue]:
        now = before = float("nan")
        if layer in history.layers:
            rows = history.signal("saturated_fraction")[-self.past :, history.of_layer(layer)]
            now, before = float(median(rows[-1])), float(median(median(rows[older])))
        low, slack = (
            max(kept, fell),
            2.0 if history.is_open_at("gradient_vanishing", layer) else 1.0,
        )
        alarm = low <= self.error and now >= self.saturated and now - before >= self.rise
        if not (alarm or low <= self.warning * slack):
            return
        yield StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=None,
            issue_type="gradient_vanishing",
            severity="error" if alarm else "warning",
            value=kept,
            threshold=self.error if alarm else self.warning,
            suggestion=(
                advice(
                    history,
                    layer,
                    "Bring the scores of the saturated heads down (QK-clip on this layer): a "
                    "saturated row passes no gradient to its own "
                    "scores, so no change of rate can reopen it.",
                )
                if alarm
                else "Look whether these parameters are meant to be frozen or gated; their rows "
                "are not saturated."
            ),
            evidence={
                "own_gradient_kept": fell,
                "saturated_fraction": now,
                "saturated_before": before,
            },
        )
