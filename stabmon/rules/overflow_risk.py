"""Query-key products near the largest float16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Fraction, Positive
from stabmon._torch.number_formats import LARGEST
from stabmon.records import LayerInfo, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.wording.code_lines import run_in_bfloat16
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import number, share


@rule
@dataclass(frozen=True)
class OverflowRisk(Rule):
    r"""Query-key products near 65504, the end of float16.

    Beyond it the softmax is NaN.

    A physical limit, so the head's own past does not matter. It binds only where the kernel writes
    the product :math:`q \cdot k` = max_logit / scale in float16 before the scale makes it small
    (eager and hand-written attention): a fused kernel accumulates in float32. bfloat16 and float32
    reach 3e38; what runs out there is precision, see ``precision_insufficient``.

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
    clears: Fraction = 0.8
    """Closing level, as a share of ``warning``."""

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest query-key product of the head."""
        score, info = history.value_at("max_logit", issue), history.info.get(issue.layer or "")
        return None if score is None or info is None else score / info.scale

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the distance to the end of float16 in words."""
        worst = issues[0]
        used = worst.value / LARGEST["float16"]
        numbers = f"largest query-key product {number(worst.value)}"
        if math.isfinite(used):
            numbers += f", {share(used)} of float16's largest number"
        title = (
            "query-key products near the end of float16"
            if math.isfinite(used)
            else "query-key products beyond float16"
        )
        return Description(title, numbers, worst.suggestion, run_in_bfloat16(framework))

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head near the limit; critical where its score is inf."""
        score = history.now("max_logit")
        exposed = history.layer_values(_is_exposed) == 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            product = score / history.layer_values(lambda info: info.scale)
        level = np.where(history.is_open("overflow_risk"), self.clears * self.warning, self.warning)
        return [
            self._issue(history, n, float(product[n]))
            for n in np.flatnonzero(exposed & (product >= level)).tolist()
        ]

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
