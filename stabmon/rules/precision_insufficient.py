"""A head's scores need more bits than its kernel keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import NonNegative
from stabmon._torch.number_formats import MANTISSA_BITS, bits_averaged
from stabmon.records import LayerInfo, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History


@rule
@dataclass(frozen=True)
class PrecisionInsufficient(Rule):
    """Rounding moves this head's attention: its scores outgrew the mantissa of the layer's dtype.

    ``precision_bits`` says how many bits a score needs so that rounding it moves at most 10 % of a
    row's probability. A kernel that writes scores in the layer's dtype (eager) rounds each score
    once, independently, and near-ties among the largest keys are decided by that. A fused kernel
    sums in float32; there only query and key were rounded, d times with independent signs, which is
    about sqrt(d / 2) times less: its need is put ½ log2(d / 2) bits lower, and it never gives an
    alarm, since such a rounding is the same in forward and backward and averages out.

    Trained models live with scores of 300 in bfloat16, two bits short. So a shortage that was there
    from the first readings is only a warning; an alarm is a shortage of ``error_shortage`` bits
    that grew up during this run by ``growth`` bits.
    """

    symptom: ClassVar[Symptom] = SCORES

    warning_shortage: NonNegative = 1.0
    """Bits short, at 1 rounding may move 20 % of a row's probability."""
    error_shortage: NonNegative = 2.0
    """Bits short, at 2 rounding may move 38 %."""
    growth: NonNegative = 2.0
    """Bits that the need must have grown over the head's first readings for an alarm: scores four
    times as large.
    """
    clears: NonNegative = 0.25
    """Bits below ``warning_shortage`` at which an open issue counts as gone."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a head that is short of bits; heads of an unknown dtype are not judged."""
        need = history.now("precision_bits") - history.layer_values(_averaging)
        have = history.layer_values(lambda _, info: MANTISSA_BITS.get(info.dtype, np.nan))
        short = need - have
        level = self.warning_shortage - np.where(
            history.is_open("precision_insufficient"), self.clears, 0.0
        )
        rounds = history.layer_values(lambda _, info: float(not info.fused)) == 1.0
        grown = history.now("precision_bits") - history.baseline("precision_bits")
        alarm = rounds & (short >= self.error_shortage) & (grown >= self.growth)
        return [
            self._issue(history, n, float(need[n]), float(have[n]), float(grown[n]), bool(alarm[n]))
            for n in np.flatnonzero(np.isfinite(short) & (short >= level)).tolist()
        ]

    def _issue(
        self, history: History, n: int, need: float, have: float, grown: float, alarm: bool
    ) -> StabilityIssue:
        layer, head = history.heads[n]
        info = history.info[layer]
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="precision_insufficient",
            severity="error" if alarm else "warning",
            value=need,
            threshold=have,
            suggestion=(
                f"{_more_bits(info)}, or bring the head's scores down by QK-clip or query/key "
                "normalisation: "
                f"{info.dtype} keeps {have:.0f} bits and its scores need {need:.1f}."
            ),
            evidence={"grown_bits": grown, "dtype": info.dtype, "fused": info.fused},
        )


def _more_bits(info: LayerInfo) -> str:
    """The way to more bits that the layer does not go yet."""
    if info.fused:
        return (
            "Give this layer's kernel its queries and keys in float32, autocast off around it "
            "(its sums are in float32 already; "
            f"what is rounded to {info.dtype} is its input)"
        )
    return "Form this layer's query-key product and softmax in float32, as a fused kernel does"


def _averaging(_: str, info: LayerInfo) -> float:
    """Bits that a fused kernel gains because its roundings average out."""
    return bits_averaged(info.head_dim) if info.fused else 0.0
