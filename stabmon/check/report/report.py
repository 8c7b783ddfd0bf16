"""What a check found, as a mapping of plain values and as something to read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stabmon.check.config import CheckConfig
from stabmon.check.judging.findings import Finding
from stabmon.check.judging.precision import FormatVerdict
from stabmon.check.measuring.arithmetic import expected_entropy
from stabmon.check.measuring.expect import LayerView
from stabmon.records import SEVERITIES

LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072)
COLUMNS = (
    "score_spread",
    "max_logit",
    "normalized_entropy",
    "saturated_fraction",
    "precision_bits",
    "hnf_log_curvature",
)
"""What the table of heads tells of each, besides what was expected and what rounding moves."""


@dataclass(frozen=True, eq=False)
class StabilityReport(Mapping[str, Any]):
    """What a check found. A mapping of plain values (see :meth:`to_dict`), a text (``str``), and
    :meth:`to_markdown`.
    """

    subject: str
    """What was checked, in words."""
    config: CheckConfig
    length: int
    """The length that it was checked for, in tokens."""
    views: tuple[LayerView, ...]
    findings: tuple[Finding, ...]
    """Ranked, the most severe first."""
    precision: tuple[FormatVerdict, ...]
    analytic: bool
    """Weights were made for the check from a config: nothing was measured on weights of the model's
    own.
    """
    loss: float | None = None
    gradients: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further parts in plain values, as a stability region or a sweep of learning rates."""

    @property
    def verdict(self) -> str:
        """``fail`` with an error, ``warn`` with a warning, else ``pass``."""
        if self.finds("error"):
            return "fail"
        return "warn" if self.finds("warning") else "pass"

    def finds(self, severity: str) -> bool:
        """Whether there is a finding of at least this severity."""
        least = SEVERITIES.index(severity)
        return any(SEVERITIES.index(each.severity) >= least for each in self.findings)

    @property
    def recommendations(self) -> list[str]:
        """What to change, the most urgent first; empty for a healthy model."""
        advised = [
            each
            for each in self.findings
            if each.recommendation is not None and each.severity != "info"
        ]
        return list(
            dict.fromkeys(
                f"{each.recommendation.what} ({each.where})"
                for each in advised
                if each.recommendation
            )
        )

    def safe(self, dtype: str) -> bool:
        """Whether ``fp16``, ``bf16`` or ``fp32`` is enough on the path that the model takes, and
        its weights are finite.
        """
        fits = [fit.safe for fit in self.precision if fit.used and fit.dtype == dtype]
        return bool(fits) and all(fits)

    def heads(self, most: int | None = None) -> list[dict[str, Any]]:
        """One entry a head, the worst first: saturated, far from what was expected, or moved by
        rounding.
        """
        rows = [self._head(view, head) for view in self.views for head in range(view.info.heads)]
        named = {(each.layer, each.head) for each in self.findings}

        def badness(row: dict[str, Any]) -> tuple[bool, float]:
            return (row["layer"], row["head"]) in named, np.nan_to_num(
                row["max_logit"], nan=math.inf
            )

        return sorted(rows, key=badness, reverse=True)[:most]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN and infinities among them."""
        return dict(self._plain)

    def to_markdown(self) -> str:
        """The report as a page of Markdown."""
        from stabmon.check.report.markdown import to_markdown

        return to_markdown(self)

    def __str__(self) -> str:
        return self.to_markdown()

    def __getitem__(self, key: str) -> Any:
        return self._plain[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    @cached_property
    def _plain(self) -> dict[str, Any]:
        basis = "analytic" if self.analytic else "measured"
        return {
            "schema_version": 1,
            "subject": self.subject,
            "verdict": self.verdict,
            "dtype": self.config.dtype,
            "seq_len": self.length,
            "basis": basis,
            "expected_logit_max": self._over(lambda view: view.expected_max),
            "measured_logit_max": self._largest("max_logit"),
            "expected_score_std": self._over(
                lambda view: float(np.nanmax(view.expected_spread, initial=-math.inf))
            ),
            "measured_score_std": self._largest("score_spread"),
            "expected_entropy_share": min(
                (view.expected_share for view in self.views), default=math.nan
            ),
            "expected_entropy_share_by_length": {n: self._entropy_share(n) for n in LENGTHS}
            if self.views
            else {},
            "curvature_bound": math.exp(min(700.0, self._largest("hnf_log_curvature"))),
            "precision_bits_needed": self._bits_needed(),
            "float16_safe": self.safe("fp16"),
            "bfloat16_safe": self.safe("bf16"),
            "float32_safe": self.safe("fp32"),
            "precision": [asdict(fit) for fit in self.precision],
            "findings": [each.to_dict() for each in self.findings],
            "recommendations": self.recommendations,
            "loss": self.loss,
            "gradients": dict(self.gradients),
            "heads": self.heads(),
            "notes": list(self.notes),
            **self.extra,
        }

    def _entropy_share(self, keys: int) -> float:
        """Entropy to expect of rows of so many keys at the widest layer's spread, as a share of ln
        n.
        """
        view = max(self.views, key=lambda each: float(np.nan_to_num(each.spread[each.widest])))
        return expected_entropy(
            float(view.spread[view.widest]), keys, view.info.softcap
        ) / math.log(keys)

    def _bits_needed(self) -> float:
        """On the path that the model takes, by the format to train in; by bfloat16 for float32,
        whose rounding is not tried.
        """
        dtype = "bf16" if self.config.dtype == "fp32" else self.config.dtype
        return max(
            (fit.bits_needed for fit in self.precision if fit.used and fit.dtype == dtype),
            default=math.nan,
        )

    def _largest(self, name: str) -> float:
        return self._over(lambda view: float(np.nanmax(view.measured[name], initial=-math.inf)))

    def _over(self, value: Any) -> float:
        return float(np.nanmax([value(view) for view in self.views])) if self.views else math.nan

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
