"""Scalars, a table of issues, alerts and, on request, every head in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.heads import colour_range, head_image, head_matrix, signal_names
from stabmon.sinks.recent_issues import COLUMNS, RecentIssues

STEP = "stabmon/step"
_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR", "critical": "ERROR"}


@sink
class WandbSink(Sink):
    """Log to the active W&B run, or to one of our own where none is active (only that one is finished on closing).

    Everything of ours has the step metric ``stabmon/step`` and never sets W&B's own step, so nothing is dropped as out of order.
    In a run that is not ours, values ride on the row that the training loop commits next, so that its own ``log(step=...)``
    calls keep their rows; a row is committed for it only when two readings come with no log between them.

    Issues go into the table ``stability/issues``, and each alarm raises a W&B alert; W&B lets one a minute through for an issue
    type. Modes and folders are W&B's own (``WANDB_MODE``, ``WANDB_DIR`` …).

    Args:
        project: project of a run of our own.
        per_head: also log the values of all heads, a histogram a signal at each sampled step (``attention_heads/<signal>``) and
            a layers × heads heatmap (``attention_heatmap/<signal>``).
        image_every: sampled steps from one heatmap to the next.
        table_seconds: least wall time between two uploads of the table of the newest 1000 issues; the last is at closing.

    Raises:
        ImportError: on opening, where wandb is not installed.
    """

    def __init__(
        self, *, project: str = "stabmon", per_head: bool = False, image_every: int = 10, table_seconds: float = 300.0
    ) -> None:
        self._project = project
        self._per_head = per_head
        self._image_every = image_every
        self._issues = RecentIssues(table_seconds)
        self._wandb: Any = None
        self._run: Any = None
        self._own = False
        self._row: int | None = None
        self._readings = 0

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        try:
            import wandb

            wandb.init  # noqa: B018  (a folder of offline runs called "wandb" imports as an empty package)
        except (ImportError, AttributeError) as error:
            raise ImportError('wandb is not installed: pip install "stabmon[wandb]"') from error
        self._wandb = wandb
        self._own = wandb.run is None
        self._run = wandb.init(project=self._project, config={"stabmon": dict(meta)}) if self._own else wandb.run
        self._row = None
        self._run.define_metric(STEP, hidden=True)
        for names in ("attention/*", "attention_layers/*", "attention_heads/*", "attention_heatmap/*", "stability/*"):
            self._run.define_metric(names, step_metric=STEP)

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        if self._run is None:
            return
        values: dict[str, Any] = {STEP: reading.step, **scalars}
        if self._per_head:
            for signal in signal_names(reading):
                values |= self._heads(reading, signal)
        if self._issues.due():
            values |= self._table()
        self._readings += 1
        self._log(values)

    def write_issue(self, issue: StabilityIssue) -> None:
        if self._run is None:
            return
        self._issues.add(issue)
        if issue.is_alarm:
            text = f"Step {issue.step}, {issue.where}: value {issue.value:.4g} (limit {issue.threshold:.4g}). {issue.suggestion}"
            level = self._wandb.AlertLevel[_LEVELS[issue.severity]]
            self._run.alert(title=f"stabmon: {issue.issue_type}", text=text, level=level)

    def close(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        if self._issues.due(last_call=True):
            run.log(self._table(), commit=False)
        if self._own:
            run.finish()

    def _log(self, values: Mapping[str, Any]) -> None:
        """Add a row to a run of our own; in another's, join the row it is filling."""
        if self._own:
            self._run.log(values, commit=True)
            return
        if self._row is not None and self._row == self._run.step:
            self._run.log({}, commit=True)
        self._run.log(values, commit=False)
        self._row = self._run.step

    def _table(self) -> dict[str, Any]:
        """The newest issues."""
        return {"stability/issues": self._wandb.Table(columns=list(COLUMNS), data=self._issues.publish())}

    def _heads(self, reading: Reading, signal: str) -> dict[str, Any]:
        """Histogram and, when it is time, heatmap of one signal."""
        matrix = head_matrix(reading, signal)
        finite = matrix[np.isfinite(matrix)]
        media: dict[str, Any] = {}
        if finite.size:
            media[f"attention_heads/{signal}"] = self._wandb.Histogram(finite)
        if self._readings % self._image_every == 0 and matrix.size:
            low, high = colour_range(signal, matrix)
            caption = f"{signal} at step {reading.step}, layers down, heads across, {low:.4g} (dark) to {high:.4g} (bright)"
            media[f"attention_heatmap/{signal}"] = self._wandb.Image(head_image(matrix, low, high), caption=caption)
        return media
