"""Query-key products near the largest float16, and exponentials near the end of their format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Fraction, Positive
from stabmon._torch.number_formats import LARGEST
from stabmon.records import LayerInfo, Severity, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.forecast import Forecast, forecast_score
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.code_lines import run_in_bfloat16
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import number, share

FORECAST_FROM = 0.5
"""Forecasts are made from this share of ``exp_warning`` on."""
FORECAST_READINGS = 8
"""Readings of the line of a forecast.

It counts where it meets the end of the format in no more steps than these took.
"""


@rule
@dataclass(frozen=True)
class OverflowRisk(Rule):
    r"""Scores near the end of their number format.

    Beyond it the softmax is NaN.

    Physical limits, so the head's own past does not matter. There are two:

    - The query-key product, where the kernel writes :math:`q \cdot k` = max_logit / scale in
      float16 before the scale makes it small (eager and hand-written attention): 65504. A fused
      kernel accumulates in float32. bfloat16 and float32 reach 3e38; what runs out there is
      precision, see ``precision_insufficient``.
    - The exponential, where a model writes :math:`e^{z_j} / \sum_k e^{z_k}` by hand and does not
      subtract the row's maximum: scores of 88.7 in float32 and bfloat16, of 11.1 in float16 (see
      the signal ``exp_range``). Training looks healthy up to the step of the NaN. An alarm is a
      score at ``exp_error`` of that, or at ``exp_warning`` and on its way: the line through its
      newest readings surely rises, and meets the end in no more steps than it was drawn through.

    Example:
        >>> from stabmon.records import Reading
        >>> layer = LayerInfo(heads=1, head_dim=64, scale=0.125, dtype="float16", fused=False)
        >>> history = History()
        >>> signals = {"max_logit": np.array([5000.0])}
        >>> history.add(Reading(1, None, {"attn": signals}, info={"attn": layer}))
        >>> OverflowRisk().check(history)
        [StabilityIssue(error overflow_risk, attn head 0, step 1, value 4e+04, threshold 3.277e+04)]

    References:
        Micikevicius et al. 2018, arXiv:1710.03740, on the range of float16 in training.
    """

    symptom: ClassVar[Symptom] = SCORES
    cause_rank: ClassVar[int] = 20

    warning: Positive = 16_384.0
    """Query-key product before scaling for a warning: a quarter of float16's range."""
    error: Positive = 32_768.0
    """Query-key product before scaling for an alarm: half of float16's range.

    One doubling of the score from inf, and scores double within few steps where they grow.
    """
    exp_warning: Fraction = 0.5
    """Share of the range of exp for a warning: one doubling of the score from inf."""
    exp_error: Fraction = 0.75
    """Share of the range of exp for an alarm, whether or not the score grows.

    The largest score of a batch was seen to be a third above that of the batch before.
    """
    clears: Fraction = 0.8
    """Closing level, as a share of ``warning`` and ``exp_warning``."""

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest query-key product of the head, or its share of the range of exp."""
        if "exp_dtype" in issue.evidence:
            return history.value_at("exp_range", issue)
        score, info = history.value_at("max_logit", issue), history.info.get(issue.layer or "")
        return None if score is None or info is None else score / info.scale

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the distance to the end of the format in words."""
        worst = issues[0]
        if "exp_dtype" in worst.evidence:
            format_, limit = worst.evidence["exp_dtype"], float(worst.evidence["limit"])
            title = f"exp of scores without the row's maximum subtracted nears {format_}'s end"
            used = share(worst.value) if math.isfinite(worst.value) else "more than 100%"
            numbers = (
                f"{used} of the range of {format_}'s exp, which overflows at {limit:.1f}; largest "
                f"score {number(float(worst.evidence['max_logit']))}"
            )
            return Description(title, numbers, worst.suggestion, _softmax(format_))
        used_share = worst.value / LARGEST["float16"]
        numbers = f"largest query-key product {number(worst.value)}"
        if math.isfinite(used_share):
            numbers += f", {share(used_share)} of float16's largest number"
        title = (
            "query-key products near the end of float16"
            if math.isfinite(used_share)
            else "query-key products beyond float16"
        )
        return Description(title, numbers, worst.suggestion, run_in_bfloat16(framework))

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({"exp_range": FORECAST_READINGS})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head near a limit; critical where it is beyond it."""
        score = history.now("max_logit")
        exposed = history.layer_values(_is_exposed) == 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            product = score / history.layer_values(lambda info: info.scale)
        level = np.where(history.is_open("overflow_risk"), self.clears * self.warning, self.warning)
        return [
            *(
                self._issue(history, n, float(product[n]))
                for n in np.flatnonzero(exposed & (product >= level)).tolist()
            ),
            *self._exponentials(history),
        ]

    def _exponentials(self, history: History) -> Iterable[StabilityIssue]:
        """Yield one issue for each head whose hand-written exponentials near their end."""
        by_hand = history.layer_values(lambda info: float(info.exp_dtype is not None)) == 1.0
        used = np.where(by_hand, history.now("exp_range"), np.nan)
        if not (used >= FORECAST_FROM * self.exp_warning).any():
            return
        forecast = forecast_score(
            history,
            1.0,
            least=FORECAST_FROM * self.exp_warning,
            readings=FORECAST_READINGS,
            signal="exp_range",
        )
        steps = history.steps[-FORECAST_READINGS:]
        comes = forecast.warns(float(steps[-1] - steps[0]))
        level = self.exp_warning * np.where(history.is_open("overflow_risk"), self.clears, 1.0)
        comes &= by_hand
        alarm = (used >= self.exp_error) | ((used >= self.exp_warning) & comes)
        for n in np.flatnonzero(alarm | comes | (used >= level)).tolist():
            severity: Severity = "error" if alarm[n] else "warning"
            yield self._exponential(
                history, n, "critical" if used[n] >= 1 else severity, float(used[n]), forecast
            )

    def _exponential(
        self, history: History, n: int, severity: Severity, used: float, forecast: Forecast
    ) -> StabilityIssue:
        layer, head = history.heads[n]
        format_ = str(history.info[layer].exp_dtype)
        limit, eta = math.log(LARGEST[format_]), float(forecast.eta[n])
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="overflow_risk",
            severity=severity,
            value=used,
            threshold=self.exp_warning if severity == "warning" else self.exp_error,
            suggestion=(
                "This layer writes its softmax as exp over a sum and does not subtract the row's "
                f"maximum, so that a score of {limit:.1f} overflows {format_} and the row is NaN: "
                "use torch.softmax, or subtract scores.amax(-1, keepdim=True) before exp, which "
                "changes nothing else; until then hold the head's scores down (QK-clip)."
            ),
            evidence={
                "max_logit": float(history.now("max_logit")[n]),
                "exp_dtype": format_,
                "limit": limit,
                "log_slope_per_step": float(forecast.slope[n]),
                "eta_interval": [float(forecast.low[n]), float(forecast.high[n])],
            },
            eta_steps=eta if np.isfinite(eta) else None,
        )

    def _issue(self, history: History, n: int, product: float) -> StabilityIssue:
        layer, head = history.heads[n]
        critical, error = not np.isfinite(product), product >= self.error
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="overflow_risk",
            severity="critical" if critical else "error" if error else "warning",
            value=product,
            threshold=self.error if error else self.warning,
            suggestion=(
                "Compute this layer's query-key product and softmax in float32 or bfloat16, use a "
                "fused kernel, or scale the query before the product; then bring the head's scores "
                "down by QK-clip: what grew so far will go on growing."
            ),
            evidence={
                "max_logit": float(history.now("max_logit")[n]),
                "scale": history.info[layer].scale,
                "limit": LARGEST["float16"],
            },
        )


def _is_exposed(info: LayerInfo) -> float:
    return float(info.dtype == "float16" and not info.fused)


def _softmax(format_: str) -> str:
    """Return the line of code that takes the softmax instead."""
    return f"weights = torch.softmax(scores{'.float()' if format_ == 'float16' else ''}, dim=-1)"
