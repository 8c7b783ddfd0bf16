"""Before training: is this model's attention going to be stable, and if not, what to change?"""

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
