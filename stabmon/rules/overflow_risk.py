"""Half-precision products of query and key come near the largest float16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Fraction, Positive
from stabmon._torch.number_formats import LARGEST
from stabmon.records import LayerInfo, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History


@rule
@dataclass(frozen=True)
class OverflowRisk(Rule):
    """A float16 layer whose query-key product comes near 65504, beyond which it is inf and the
    softmax NaN.

    A physical limit, so the head's own past does not matter. It binds only where the kernel writes
    the product in float16 before the scale makes it small (eager and hand-written attention): a
    fused kernel accumulates in float32. bfloat16 and float32 reach 3e38; what runs out there is
    precision, see ``precision_insufficient``.
    """

    symptom: ClassVar[Symptom] = SCORES

    warning: Positive = 16_384.0
    """Largest query-key product before scaling, a quarter of float16's range."""
    error: Positive = 32_768.0
    """Half of float16's range: one doubling of the score from inf, and scores double within few
    steps where they grow.
    """
    clears: Fraction = 0.8
    """Share of ``warning`` below which an open issue counts as gone."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a head that is near the limit; critical where its score is inf already."""
        score = history.now("max_logit")
        exposed = history.layer_values(_is_exposed) == 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            product = score / history.layer_values(lambda _, info: info.scale)
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
                "fused kernel, or scale the "
                "query before the product; then bring the head's scores down by QK-clip: what "
                "grew so far will go on growing."
            ),
            evidence={
                "max_logit": float(history.now("max_logit")[n]),
                "scale": history.info[layer].scale,
                "limit": LARGEST["float16"],
            },
        )


def _is_exposed(_: str, info: LayerInfo) -> float:
    return float(info.dtype == "float16" and not info.fused)
