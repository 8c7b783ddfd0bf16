"""See attention go wrong during transformer training, before the loss shows it, and put it right.

>>> import stabmon, torch
>>> monitor = stabmon.AttentionStabilityMonitor(torch.nn.Linear(2, 2), sinks=[])
>>> monitor.close()
"""

from stabmon._moved import install as _install_moved_paths
from stabmon.check import check_attention_stability
from stabmon.config import StabilityConfig, load_config
from stabmon.diagnosis import Diagnosis
from stabmon.engine.analyzer import AttentionAnalyzer
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.records import AttentionCall, NonFinite, Reading, StabilityIssue

_install_moved_paths()

__version__ = "0.1.0"
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
]
