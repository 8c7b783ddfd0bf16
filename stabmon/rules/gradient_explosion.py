"""Explosion of the whole model's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, NonNegative, Positive, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.baselines import loss_rose
from stabmon.rules.evidence.moved_part import moved_part
from stabmon.rules.evidence.robust_stats import median_over_steps, robust_spread
from stabmon.rules.symptoms import LOSS, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.code_lines import clip_gradients
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, number, with_limit


@rule
@renamed(stays="persistence", least_past="min_history")
@dataclass(frozen=True)
class GradientExplosion(Rule):
    r"""Gradient norm of the model above its recent range.

    With m and s the median and the robust standard deviation of the log norm over ``past``
    readings, the newest log norm must exceed both :math:`m + deviations \cdot s` and :math:`m + \ln
    warning`.

    A single large gradient is common in healthy runs (up to 14 times the recent median in our own)
    and clipping makes it harmless: a warning. An alarm is a gradient far beyond its range for
    ``persistence`` readings in a row while the loss rises: then steps of the wrong size or
    direction are being taken. Attributed to no head; the layer that grew most is in the evidence.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step in range(1, 21):
        ...     norm = 90.0 if step == 20 else 1.0 + 0.1 * (step % 3)
        ...     history.add(Reading(step, None, {}, gradients={"": norm}))
        >>> GradientExplosion().check(history)
        [StabilityIssue(warning gradient_explosion, run, step 20, value 90, threshold 11)]

    References:
        Pascanu et al. 2013, arXiv:1211.5063, on exploding gradients and their clipping.
    """

    symptom: ClassVar[Symptom] = LOSS
    quantity: ClassVar[str] = "gradient norm"
    reads: ClassVar[tuple[str, ...]] = ("gradients",)

    deviations: NonNegative = 6.0
    """Robust standard deviations of the log norm above its recent median."""
    warning: Positive = 10.0
    """Norm of a warning, as a multiple of the recent median."""
    error: Positive = 10.0
    """Norm of an alarm, as a multiple of the recent median.

    For ``persistence`` readings, with a rising loss.
    """
    persistence: Count = 3
    """Number of readings in a row needed for an alarm."""
    past: Count = 50
    """Number of readings in the recent range."""
    min_history: Count = 12
    """Number of readings needed before any is judged."""

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest norm of the whole gradient."""
        return history.latest.gradients.get("")

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the norm beside its median in words, and the norm to clip at."""
        worst = issues[0]
        middle = known(worst.evidence, "recent_median")
        numbers = with_limit("gradient norm", worst)
        numbers += "" if middle is None else f", recent median {number(middle)}"
        most = worst.evidence.get("layer_grown_most")
        numbers += f"; {most} grew most" if most else ""
        part = worst.evidence.get("part_moved_most")
        numbers += f"; steps of {part} are longer than before" if part else ""
        code = "" if middle is None else clip_gradients(framework, 2 * middle)
        return Description("gradient norm jumped", numbers, worst.suggestion, code)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return at most one issue, for the run; ``value`` is the norm of its gradient.

        A norm that is NaN or inf is left to ``non_finite``.
        """
        norms = history.gradients("")
        if (
            len(norms) < self.min_history + self.persistence
            or not np.isfinite(norms[-1])
            or norms[-1] <= 0
        ):
            return []
        newest = _log(norms[-self.persistence :])
        past = _log(norms[-self.past - self.persistence : -self.persistence])
        steps = history.steps[-self.past - self.persistence : -self.persistence]
        if np.isfinite(past).sum() < self.min_history:
            return []
        middle = float(median_over_steps(past[:, None], steps)[0])
        spread = float(robust_spread(past[:, None])[0])
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
                    "Clip the gradient norm near its recent median, and check the batch; if it "
                    "comes back, lower the rate or go back to a checkpoint before it."
                ),
                evidence={
                    "recent_median": float(np.exp(middle)),
                    "recent_log_spread": spread,
                    "stays": high,
                    "layer_grown_most": most,
                    **moved_part(history),
                },
            )
        ]


def _log(norms: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        out: np.ndarray = np.where(norms > 0, np.log(norms), np.nan)
    return out


def _growth(norms: np.ndarray, newest: int) -> float:
    """Return the newest log norm minus the median of those before the ``newest``."""
    past = _log(norms[:-newest])
    past = past[np.isfinite(past)]
    return float(_log(norms[-1:])[0] - np.median(past)) if len(past) else float("nan")
