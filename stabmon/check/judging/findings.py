"""Findings of a check, and recommendations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stabmon.records import SEVERITIES, Severity

Basis = Literal["analytic", "measured", "analytic and measured"]


@dataclass(frozen=True)
class Recommendation:
    """One specific change.

    Example:
        >>> Recommendation("halve the rate", "optimizer", "lr=5e-4", "smaller scores", "-").code
        'lr=5e-4'
    """

    what: str
    where: str
    code: str
    """The line of code or of the config to write."""
    effect: str
    """The expected effect, in numbers where there are any."""
    source: str


@dataclass(frozen=True)
class Finding:
    """One present or expected fault of a model's attention.

    Example:
        >>> Finding("overflow_risk", "error", "measured", 4e4, 3.3e4, "q·k is 4e4", "h.0", 1).where
        'h.0 head 1'
    """

    name: str
    """Name of the failure mode.

    One of ``non_finite, overflow_risk, precision_insufficient, saturated_softmax, scale_missing,
    damaged_head, head_dim_too_small, inputs_not_normalised, learning_rate_too_high``.
    """
    severity: Severity
    basis: Basis
    """The evidence: shapes and weights alone, a forward of the model, or both."""
    value: float
    limit: float
    text: str
    """One sentence with the numbers."""
    layer: str | None = None
    head: int | None = None
    recommendation: Recommendation | None = None
    also: int = 0
    """Number of further places with this finding; this one is the worst."""

    @property
    def where(self) -> str:
        """Return the place in words."""
        if self.layer is None:
            return "model"
        place = self.layer if self.head is None else f"{self.layer} head {self.head}"
        return f"{place} and {self.also} more" if self.also else place

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON.

        Returns:
            Value by field, the recommendation as a dict, and ``where``.

        Example:
            >>> finding = Finding("overflow_risk", "error", "measured", 4e4, 3.3e4, "", "h.0", 1)
            >>> finding.to_dict()["where"]
            'h.0 head 1'
        """
        return asdict(self) | {"where": self.where}


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort findings, the most severe first.

    Among equals those furthest beyond their limit come first.
    """

    def excess(finding: Finding) -> float:
        if finding.limit == 0 or finding.value != finding.value:
            return float("inf")
        ratio = abs(finding.value / finding.limit)
        return max(ratio, 1 / ratio) if ratio > 0 else float("inf")

    return tuple(
        sorted(findings, key=lambda each: (-SEVERITIES.index(each.severity), -excess(each)))
    )


def counts(findings: tuple[Finding, ...]) -> Mapping[str, int]:
    """Count the findings of each severity present, the most severe first."""
    found = [each.severity for each in findings]
    return {
        severity: found.count(severity) for severity in reversed(SEVERITIES) if severity in found
    }
