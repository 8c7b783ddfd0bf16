"""Signals: functions of an attention operator that give one number per row.

``SIGNALS`` finds them by name; :func:`measure` reduces them to one number per head.
"""

from stabmon.signals.base import SIGNALS, Signal, signal
from stabmon.signals.curvature import (
    hnf_log_curvature,
    hnf_log_curvature_bound,
    saturated_fraction,
    softmax_jacobian_norm,
)
from stabmon.signals.entropy import (
    attention_entropy,
    collision_probability,
    effective_keys,
    normalized_entropy,
)
from stabmon.signals.reduce import HeadSums, measure
from stabmon.signals.scores import (
    exp_range,
    max_logit,
    max_probability,
    precision_bits,
    sink_mass,
)

__all__ = [
    "SIGNALS",
    "HeadSums",
    "Signal",
    "attention_entropy",
    "collision_probability",
    "effective_keys",
    "exp_range",
    "hnf_log_curvature",
    "hnf_log_curvature_bound",
    "max_logit",
    "max_probability",
    "measure",
    "normalized_entropy",
    "precision_bits",
    "saturated_fraction",
    "signal",
    "sink_mass",
    "softmax_jacobian_norm",
]
