"""The report of a check: a mapping of plain values and a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stabmon._display.html import card, line, table
from stabmon.check.judging.findings import counts
from stabmon.check.measuring.arithmetic import expected_entropy
from stabmon.check.report.markdown import to_markdown
from stabmon.check.report.results import CheckResults
from stabmon.check.report.words import sentences

LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072)


@dataclass(frozen=True, eq=False)
class StabilityReport(CheckResults, Mapping[str, Any]):
    """Report of a check.

    A mapping of plain values (see :meth:`to_dict`), a text (``str``), and :meth:`to_markdown`.

    Example:
        >>> import torch, stabmon
        >>> layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
        >>> report = stabmon.check_attention_stability(layer, torch.randn(1, 16, 32))
        >>> report.verdict, report["float16_safe"], report.recommendations
        ('pass', True, [])
    """

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, NaN and infinities included.

        Returns:
            A copy of the mapping that the report is.

        Example:
            >>> import torch, stabmon
            >>> layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
            >>> report = stabmon.check_attention_stability(layer, torch.randn(1, 16, 32))
            >>> report.to_dict()["schema_version"]
            1
        """
        return dict(self._plain)

    def to_markdown(self) -> str:
        """Return the report as a page of Markdown.

        Returns:
            The text, in lines; ``str`` of the report returns the same.

        Example:
            >>> import torch, stabmon
            >>> layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
            >>> report = stabmon.check_attention_stability(layer, torch.randn(1, 16, 32))
            >>> report.to_markdown() == str(report)
            True
        """
        return to_markdown(self)

    def __repr__(self) -> str:
        found = ", ".join(f"{number} {kind}" for kind, number in counts(self.findings).items())
        return f"StabilityReport({self.verdict}, {self.subject}, findings: {found or 'none'})"

    def _repr_html_(self) -> str:
        """Return the verdict, the findings with what to do, and the settings, for notebooks."""
        rows = [
            (each.severity, each.text, each.where, getattr(each.recommendation, "what", ""))
            for each in self.findings
        ]
        basis = "weights as the config draws them" if self.analytic else "the model's own weights"
        severity = {"fail": "error", "warn": "warning"}.get(self.verdict, "info")
        return card(
            f"Stability check: {self.verdict}",
            line(f"{self.subject}, {self.length} tokens, {self.config.dtype}, from {basis}"),
            table(("", "finding", "where", "to do"), rows) or line("no finding"),
            severity=severity,
        )

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
            "summary": sentences(self),
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
        """Return the entropy to expect of rows of ``keys`` keys, as a share of ln n.

        At the spread of the widest layer.
        """
        view = max(self.views, key=lambda each: float(np.nan_to_num(each.spread[each.widest])))
        return expected_entropy(
            float(view.spread[view.widest]), keys, view.info.softcap
        ) / math.log(keys)

    def _bits_needed(self) -> float:
        """Return the bits needed by the format to train in, on the model's path.

        bfloat16 stands in for float32, whose rounding is not tried.
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
