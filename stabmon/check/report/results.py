"""Results of a check, and conclusions from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stabmon.check.config import CheckConfig
from stabmon.check.judging.findings import Finding
from stabmon.check.judging.precision import FormatVerdict
from stabmon.check.measuring.expect import LayerView
from stabmon.records import SEVERITIES

COLUMNS = (
    "score_spread",
    "max_logit",
    "normalized_entropy",
    "saturated_fraction",
    "precision_bits",
    "hnf_log_curvature",
)
"""Measurements listed for each head.

The expected spread and the probability moved by rounding come on top.
"""


@dataclass(frozen=True, eq=False)
class CheckResults:
    """Findings, measurements and settings of one check."""

    subject: str
    """Description of the model."""
    config: CheckConfig
    length: int
    """Length checked for, in tokens."""
    views: tuple[LayerView, ...]
    findings: tuple[Finding, ...]
    """Findings, the most severe first."""
    precision: tuple[FormatVerdict, ...]
    analytic: bool
    """True where weights were made for the check from a config.

    Nothing was then measured on weights of the model's own.
    """
    loss: float | None = None
    gradients: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sample: str = ""
    """Description of the input of the forward; empty where none was made."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further parts in plain values: a stability region, a sweep of learning rates."""

    @property
    def verdict(self) -> str:
        """Return ``fail`` with an error, ``warn`` with a warning, else ``pass``."""
        if self.finds("error"):
            return "fail"
        return "warn" if self.finds("warning") else "pass"

    def finds(self, severity: str) -> bool:
        """Return whether there is a finding of at least this severity."""
        least = SEVERITIES.index(severity)
        return any(SEVERITIES.index(each.severity) >= least for each in self.findings)

    @property
    def recommendations(self) -> list[str]:
        """Return the changes to make, the most urgent first; empty for a healthy model."""
        advised = {
            f"{each.recommendation.what} ({each.where})": None
            for each in self.findings
            if each.recommendation is not None and each.severity != "info"
        }
        return list(advised)

    def safe(self, dtype: str) -> bool:
        """Return whether ``fp16``, ``bf16`` or ``fp32`` suffices on the model's path.

        Only with finite weights.
        """
        fits = [fit.safe for fit in self.precision if fit.used and fit.dtype == dtype]
        return bool(fits) and all(fits)

    def heads(self, most: int | None = None) -> list[dict[str, Any]]:
        """Return one entry per head, the worst first.

        Heads with a finding come first, then those with the largest scores.

        Args:
            most: number of heads; None for all.
        """
        rows = [self._head(view, head) for view in self.views for head in range(view.info.heads)]
        named = {(each.layer, each.head) for each in self.findings}

        def badness(row: dict[str, Any]) -> tuple[bool, float]:
            return (row["layer"], row["head"]) in named, np.nan_to_num(
                row["max_logit"], nan=math.inf
            )

        return sorted(rows, key=badness, reverse=True)[:most]

    def _head(self, view: LayerView, head: int) -> dict[str, Any]:
        path = "fused" if view.info.fused else "eager"
        entry: dict[str, Any] = {
            "layer": view.layer,
            "head": head,
            "expected_score_std": float(view.expected_spread[head]),
        }
        entry |= {name: float(view.measured[name][head]) for name in COLUMNS}
        for dtype in ("fp16", "bf16"):
            entry[f"moved_by_{dtype}"] = float(view.measured[f"moved/{path}/{dtype}"][head])
        if view.weights is not None:
            entry |= {
                "query_weight_norm": float(view.weights.query[head]),
                "key_weight_norm": float(view.weights.key[head]),
            }
        return entry
