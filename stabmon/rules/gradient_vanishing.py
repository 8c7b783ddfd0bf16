"""Vanishing of an attention layer's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.context import advice
from stabmon.rules.evidence.robust_stats import median, median_over_steps
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, share


@rule
@renamed(least_past="min_history")
@dataclass(frozen=True)
class GradientVanishing(Rule):
    r"""Lost gradient of a layer whose rows saturate.

    Judged against the layer's own past and against the model's gradient. The gradient that reaches
    a row's scores is at most lambda times that which reaches its probabilities, and lambda, the
    largest eigenvalue of the softmax's Jacobian :math:`\mathrm{diag}(p) - p p^T`, goes to zero as a
    row turns one-hot. So a layer whose share of the model's gradient fell to ``error`` of what it
    was, with most rows saturated that were not before, can no longer learn where to attend: an
    alarm. A fall without saturated rows has another cause (frozen parameters, a closing gate): a
    warning. A layer's value and output weights still receive gradient when its rows saturate, so
    this comes late; ``logit_growth`` comes first.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step in range(1, 31):
        ...     norm = 1e-4 if step > 28 else 0.3
        ...     history.add(Reading(step, None, {}, gradients={"": 1.0, "attn": norm}))
        >>> [issue.severity for issue in GradientVanishing().check(history)]  # nothing saturated
        ['warning']

    References:
        Zhai et al. 2023, arXiv:2303.06296, on saturated rows and the norm of the softmax's
        Jacobian.
    """

    symptom: ClassVar[Symptom] = SCORES
    cause_rank: ClassVar[int] = 45
    reads: ClassVar[tuple[str, ...]] = ("gradients",)

    warning: Fraction = 0.02
    """Share of the model's gradient norm, over what it was, for a warning."""
    error: Fraction = 0.05
    """The same for an alarm, where rows saturated as well."""
    saturated: Fraction = 0.5
    """Mean share of saturated rows over the layer's heads, at least, for an alarm."""
    rise: Fraction = 0.25
    """Least rise of that share since the past, for an alarm."""
    past: Count = 64
    """Number of readings; those of the older half of their steps are the past."""
    min_history: Count = 12
    """Number of readings needed before any is judged."""

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the share of the gradient that is left in words."""
        worst = issues[0]
        numbers = f"its share of the model's gradient is {share(worst.value)} of what it was"
        saturated = known(worst.evidence, "saturated_fraction")
        if saturated is not None:
            before = known(worst.evidence, "saturated_before") or 0.0
            numbers += f"; saturated rows {share(saturated)}, were {share(before)}"
        return Description("gradient of attention vanishes", numbers, worst.suggestion)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({"saturated_fraction": self.past})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Yield one issue for each layer whose gradient collapsed.

        ``value`` is its share of the model's gradient, over what that share was.
        """
        layers = [layer for layer in history.latest.gradients if layer]
        if len(history) < self.min_history + 2 or not layers:
            return
        own = np.stack([history.gradients(layer)[-self.past :] for layer in layers], axis=1)
        whole = history.gradients("")[-self.past :, None]
        steps = history.steps[-self.past :]
        older = slice(0, max(self.min_history, int((2 * steps < steps[0] + steps[-1]).sum())))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where((whole > 0) & np.isfinite(whole), own / whole, np.nan)
            kept = median(share[-2:]) / median_over_steps(share[older], steps[older])
            fell = median(own[-2:]) / median_over_steps(own[older], steps[older])
        low = np.maximum(kept, fell)  # both must have collapsed
        for n in np.flatnonzero(low <= max(self.error, 2 * self.warning)).tolist():
            yield from self._judge(history, layers[n], float(kept[n]), float(fell[n]), older)

    def _judge(
        self, history: History, layer: str, kept: float, fell: float, older: slice
    ) -> Iterable[StabilityIssue]:
        now = before = float("nan")
        if layer in history.layers:
            rows = history.rows(
                "saturated_fraction", slice(-self.past, None), history.of_layer(layer)
            )
            now, before = float(median(rows[-1])), float(median(median(rows[older])))
        low = max(kept, fell)
        slack = 2.0 if history.is_open_at("gradient_vanishing", layer) else 1.0
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
                    "saturated row passes no gradient to its own scores, so no change of rate can "
                    "reopen it.",
                )
                if alarm
                else "Check whether these parameters are meant to be frozen or gated: their rows "
                "are not saturated."
            ),
            evidence={
                "own_gradient_kept": fell,
                "saturated_fraction": now,
                "saturated_before": before,
            },
        )
