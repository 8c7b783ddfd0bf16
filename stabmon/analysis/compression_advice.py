"""placeholder"""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any
@dataclass(frozen=True)
class Recommendation:
    policy: str = ""
@dataclass(frozen=True)
class CompressionAdvice:
    recommendations: list[Recommendation] = field(default_factory=list)
    rejected: list[Recommendation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
def compression_advice(model: Any, batch: Any, *, loss_fn: Any = None) -> CompressionAdvice:
    return CompressionAdvice()
