from stabmon.check import check_attention_stability as check_attention_stability
from stabmon.config import StabilityConfig as StabilityConfig
from stabmon.config import load_config as load_config
from stabmon.diagnosis import Diagnosis as Diagnosis
from stabmon.engine.analyzer import AttentionAnalyzer as AttentionAnalyzer
from stabmon.engine.monitor import AttentionStabilityMonitor as AttentionStabilityMonitor
from stabmon.records import AttentionCall as AttentionCall
from stabmon.records import NonFinite as NonFinite
from stabmon.records import Reading as Reading
from stabmon.records import StabilityIssue as StabilityIssue
from stabmon.sinks.reader import read_records as read_records

__all__ = [
    "AttentionAnalyzer",
    "AttentionCall",
    "AttentionStabilityMonitor",
    "Diagnosis",
    "NonFinite",
    "Reading",
    "StabilityConfig",
    "StabilityIssue",
    "check_attention_stability",
    "load_config",
    "read_records",
]
__version__: str
