"""Before training: is this model's attention going to be stable, and if not, what to change?"""

from stabmon.check.attention_stability import check_attention_stability
from stabmon.check.findings import Finding, Recommendation
from stabmon.check.report import StabilityReport
from stabmon.check.settings import CheckConfig

__all__ = ["CheckConfig", "Finding", "Recommendation", "StabilityReport", "check_attention_stability"]
