"""One thing that a check has found, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stabmon.records import SEVERITIES, Severity

Basis = Literal["analytic", "measured", "analytic and measured"]


@dataclass(frozen=True)
class Recommendation:
    """What to change, specifically."""

    what: str
    where: str
    code: str
    """The line of code or of the config that does it."""
    effect: str
    """What it is expected to change, in numbers where there are any."""
    source: str


@dataclass(frozen=True)
class Finding:
    """One thing that is, or will be, wrong with a model's attention."""

    name: str
    """One of ``non_finite, overflow_risk, precision_insufficient, saturated_softmax, scale_missing,
    damaged_head, head_dim_too_small, inputs_not_normalised, learning_rate_too_high``."""
    severity: Severity
    basis: Basis
    """Whether it follows from shapes and weights alone, or from a forward that was made."""
    value: float
    limit: float
    text: str
    """In one sentence, with the numbers."""
    layer: str | None = None
    head: int | None = None
    recommendation: Recommendation | None = None
    also: int = 0
    """How many more places are like this one, the worst."""

    @property
    def where(self) -> str:
        """The place in words."""
        if self.layer is None:
            return "model"
        place = self.layer if self.head is None else f"{self.layer} head {self.head}"
        return f"{place} and {self.also} more" if self.also else place

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"where": self.where}


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """The most severe first; among equals those that are furthest beyond their limit."""

    def excess(finding: Finding) -> float:
        if finding.limit == 0 or finding.value != finding.value:
            return float("inf")
        ratio = abs(finding.value / finding.limit)
        return max(ratio, 1 / ratio) if ratio > 0 else float("inf")

    return tuple(
        sorted(findings, key=lambda each: (-SEVERITIES.index(each.severity), -excess(each)))
    )


def counts(findings: tuple[Finding, ...]) -> Mapping[str, int]:
    """How many there are of each severity that there is."""
    found = [each.severity for each in findings]
    return {
        severity: found.count(severity) for severity in reversed(SEVERITIES) if severity in found
    }
