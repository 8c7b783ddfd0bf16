"""Predict before training whether a model's attention will be stable."""

from stabmon.check.api import check_attention_stability
from stabmon.check.config import CheckConfig
from stabmon.check.judging.findings import Finding, Recommendation
from stabmon.check.report.report import StabilityReport

__all__ = [
    "CheckConfig",
    "Finding",
    "Recommendation",
    "StabilityReport",
    "check_attention_stability",
]
