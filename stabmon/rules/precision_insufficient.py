"""Shortage of bits in a kernel's scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import NonNegative
from stabmon._torch.number_formats import MANTISSA_BITS, bits_averaged
from stabmon.records import LayerInfo, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.description import Description


@rule
@dataclass(frozen=True)
class PrecisionInsufficient(Rule):
    """Scores so large that rounding moves attention.

    ``precision_bits`` is the number of bits that a score needs so that rounding it moves at most 10
    % of a row's probability. A kernel that writes scores in the layer's dtype (eager) rounds each
    score once, independently, and near-ties among the largest keys are decided by that. A fused
    kernel sums in float32; there only query and key were rounded, d times with independent signs,
    which is about sqrt(d / 2) times less: its need is put ½ log2(d / 2) bits lower, and it never
    gives an alarm, since such a rounding is the same in forward and backward and averages out.

    Trained models live with scores of 300 in bfloat16, two bits short. So a shortage that was there
    from the first readings is only a warning; an alarm is a shortage of ``error_shortage`` bits
    that grew during this run by ``growth`` bits.

    Example:
        >>> from stabmon.records import Reading
        >>> layer = LayerInfo(heads=1, head_dim=64, scale=0.125, dtype="bfloat16", fused=False)
        >>> history = History()
        >>> for step, bits in enumerate([5.0, 5.0, 5.0, 5.0, 5.0, 11.0], start=1):
        ...     signals = {"precision_bits": np.array([bits])}
        ...     history.add(Reading(step, None, {"attn": signals}, info={"attn": layer}))
        >>> PrecisionInsufficient().check(history)
        [StabilityIssue(error precision_insufficient, attn head 0, step 6, value 11, threshold 8)]
    """

    symptom: ClassVar[Symptom] = SCORES
    cause_rank: ClassVar[int] = 40

    warning_shortage: NonNegative = 1.0
    """Missing bits for a warning; at 1, rounding may move 20 % of a row's probability."""
    error_shortage: NonNegative = 2.0
    """Missing bits for an alarm; at 2, rounding may move 38 %."""
    growth: NonNegative = 2.0
    """Rise of the need over the head's first readings for an alarm, in bits.

    At 2, scores are four times as large.
    """
    clears: NonNegative = 0.25
    """Closing level, in bits below ``warning_shortage``."""

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the number of bits that the head needs now."""
        need, info = history.value_at("precision_bits", issue), history.info.get(issue.layer or "")
        return None if need is None or info is None else need - _averaging(info)

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the missing bits in words."""
        worst = issues[0]
        dtype = worst.evidence.get("dtype", "the number format")
        title = f"{dtype} keeps too few bits for attention scores"
        numbers = f"bits needed {worst.value:.1f}, kept {worst.threshold:.0f}"
        return Description(title, numbers, worst.suggestion)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({}, frozenset({"precision_bits"}))

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head that is short of bits.

        ``value`` is the number of bits needed, ``threshold`` the number kept. Heads of an unknown
        dtype are not judged.
        """
        need = history.now("precision_bits") - history.layer_values(_averaging)
        have = history.layer_values(lambda info: MANTISSA_BITS.get(info.dtype, np.nan))
        short = need - have
        level = self.warning_shortage - np.where(
            history.is_open("precision_insufficient"), self.clears, 0.0
        )
        rounds = history.layer_values(lambda info: float(not info.fused)) == 1.0
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
                f"normalisation: {info.dtype} keeps {have:.0f} bits and its scores need {need:.1f}."
            ),
            evidence={"grown_bits": grown, "dtype": info.dtype, "fused": info.fused},
        )


def _more_bits(info: LayerInfo) -> str:
    """Return a way to more bits that the layer does not use yet."""
    if info.fused:
        return (
            "Give this layer's kernel its queries and keys in float32, autocast off around it "
            f"(its sums are in float32 already; only its input is rounded to {info.dtype})"
        )
    return "Form this layer's query-key product and softmax in float32, as a fused kernel does"


def _averaging(info: LayerInfo) -> float:
    """Return the bits that a fused kernel gains since its roundings average out."""
    return bits_averaged(info.head_dim) if info.fused else 0.0
