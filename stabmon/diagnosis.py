"""Diagnosis of one sampled step: issues, statistics and their figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stabmon._display.html import card, head_map, line
from stabmon.figures.signals import signal_evolution, signal_heatmap
from stabmon.incidents import Incident
from stabmon.incidents.html import incident_table
from stabmon.records import SEVERITIES, Reading, StabilityIssue, counted, head_count
from stabmon.signals.presentation import presentation_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Result of one sampled step.

    Attributes:
        step: the optimizer step, counted from 1.
        issues: the issues that opened, worsened or closed at this step.
        stats: ``stats[layer][signal]`` is float64 ``[H]``, one value per query head.
        readings: the readings so far, oldest first, for plots over time.
        open_issues: every issue open after this step.
        unseen: module -> the part of its attention that is not seen; no statistic and no issue
            covers it.
        incidents: the incidents that changed at this step: its issues by cause, in words.

    Example:
        >>> diagnosis = Diagnosis(10, (), {"attn": {"max_logit": np.array([1.5, 2.0])}})
        >>> diagnosis
        Diagnosis(step=10, 1 layer, 2 heads, 0 issues, 0 open issues)
        >>> diagnosis.has_issues()
        False
    """

    step: int
    issues: tuple[StabilityIssue, ...]
    stats: Mapping[str, Mapping[str, np.ndarray]]
    readings: tuple[Reading, ...] = ()
    open_issues: tuple[StabilityIssue, ...] = ()
    unseen: Mapping[str, str] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()

    def __repr__(self) -> str:
        heads = sum(head_count(signals) for signals in self.stats.values())
        parts = (
            f"step={self.step}",
            counted(len(self.stats), "layer"),
            counted(heads, "head"),
            _by_severity(self.issues, "issue"),
            _by_severity(self.open_issues, "open issue"),
        )
        return f"Diagnosis({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return the incidents, open issues, and a map of heads, for notebooks."""
        worst = max((i.severity for i in self.open_issues), key=SEVERITIES.index, default="info")
        return card(
            repr(self),
            incident_table(self.incidents) or line("no incident changed at this step"),
            self._map(),
            severity=worst,
        )

    def _map(self) -> str:
        """Return a map of the normalised entropy, or of the first signal there is."""
        known = dict.fromkeys(name for signals in self.stats.values() for name in signals)
        if not known:
            return line("no attention was measured")
        signal = "normalized_entropy" if "normalized_entropy" in known else next(iter(known))
        shown = presentation_of(signal)
        rows = {
            layer: np.asarray(signals[signal], dtype=np.float64)
            for layer, signals in self.stats.items()
            if signal in signals
        }
        marks = {
            (issue.layer, issue.head): issue.letter
            for issue in sorted(self.open_issues, key=lambda each: SEVERITIES.index(each.severity))
            if issue.layer is not None and issue.head is not None
        }
        types = sorted({issue.issue_type for issue in self.open_issues if issue.head is not None})
        letters = "".join(f"; {name[:1].upper()}: {name} is open" for name in types)
        caption = f"{signal.replace('_', ' ')} of each head, bars in {shown.unit}{letters}"
        return head_map(rows, shown.limits, marks, caption)

    def has_issues(self) -> bool:
        """Return True if any issue opened or worsened at this step."""
        return any(issue.state != "closed" for issue in self.issues)

    def plot_entropy_heatmap(self, path: str | Path | None = None) -> Figure:
        """Draw the normalised entropy of every head at this step, layers by heads.

        Args:
            path: file to save to; None saves nothing.

        Returns:
            The figure.

        Raises:
            ValueError: if no normalised entropy was measured.
            ImportError: if matplotlib is not installed.
        """
        signal = "normalized_entropy"
        shown = presentation_of(signal)
        return signal_heatmap(
            self.stats, signal, self.step, path, unit=shown.unit, limits=shown.limits
        )

    def plot_curvature_evolution(self, path: str | Path | None = None) -> Figure:
        """Draw the largest log curvature (the tight bound) of every layer over the steps.

        Args:
            path: file to save to; None saves nothing.

        Returns:
            The figure.

        Raises:
            ValueError: if there is no reading, or none has a curvature.
            ImportError: if matplotlib is not installed.
        """
        signal = "hnf_log_curvature"
        shown = presentation_of(signal)
        return signal_evolution(
            [reading.step for reading in self.readings],
            [reading.layers for reading in self.readings],
            signal,
            path,
            unit=shown.unit,
            reduction=shown.reduction,
        )


def _by_severity(issues: tuple[StabilityIssue, ...], noun: str) -> str:
    """Count issues in words, the worst first: ``3 issues: 1 error, 2 warning``."""
    counts = {
        severity: sum(issue.severity == severity for issue in issues)
        for severity in reversed(SEVERITIES)
    }
    parts = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count)
    return counted(len(issues), noun) + (f": {parts}" if parts else "")
