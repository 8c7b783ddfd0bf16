"""Calibrated risk that attention damages a run, from features without a scale."""

from stabmon.risk.judge import RiskJudge
from stabmon.risk.model import Piece, RiskModel, load_risk_model

__all__ = ["Piece", "RiskJudge", "RiskModel", "load_risk_model"]
