"""Scalars, issues, alerts and, on request, every head in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.head_images import colour_range, head_image, head_matrix, signal_names
from stabmon.sinks.issue_table import COLUMNS, RecentIssues
from stabmon.sinks.wandb_guest import GuestRows

STEP = "stabmon/step"
_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR", "critical": "ERROR"}


@sink
class WandbSink(Sink):
    """Log to the active W&B run, or to a run of its own.

    The run is found at the first record; one of our own is made where none is active then.
    Everything of ours has the step metric ``stabmon/step`` and never sets W&B's own step, so
    nothing is dropped as out of order. A run that is not ours is never finished and no row of it
    committed while it goes on: a reading rides on the row that its owner commits next, and those
    that found none are added as the run ends (:class:`~stabmon.sinks.wandb_guest.GuestRows`). A run
    of our own does not become ``wandb.run``, and is finished on closing.

    Issues go into the table ``stability/issues``, and each alarm raises a W&B alert; W&B lets one a
    minute through for an issue type. Modes and folders are W&B's own (``WANDB_MODE``, ``WANDB_DIR``
    …).

    Args:
        run: a ``wandb.Run`` to write to instead, which is treated as somebody else's.
        project: project of a run of our own.
        per_head: also log the values of all heads, one histogram per signal and sampled step
            (``attention_heads/<signal>``) and a layers × heads heatmap
            (``attention_heatmap/<signal>``).
        image_every: sampled steps from one heatmap to the next.
        table_seconds: least wall time between two uploads of the table of the newest 1000 issues;
            the last is at closing.

    Raises:
        ImportError: on opening, where wandb is not installed.
    """

    def __init__(
        self,
        *,
        run: Any = None,
        project: str = "stabmon",
        per_head: bool = False,
        image_every: int = 10,
        table_seconds: float = 300.0,
    ) -> None:
        self._given = run
        self._project = project
        self._per_head = per_head
        self._image_every = image_every
        self._issues = RecentIssues(table_seconds)
        self._wandb: Any = None
        self._run: Any = None
        self._guest: GuestRows | None = None
        self._meta: Mapping[str, Any] = {}
        self._readings = 0

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        try:
            import wandb

            # a folder of offline runs called "wandb" imports as an empty package
            wandb.init  # noqa: B018
        except (ImportError, AttributeError) as error:
            raise ImportError('wandb is not installed: pip install "stabmon[wandb]"') from error
        self._wandb, self._meta = wandb, meta

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        if not self._join():
            return
        values: dict[str, Any] = {STEP: reading.step, **scalars}
        media: dict[str, Any] = {}
        if self._per_head:
            for signal in signal_names(reading):
                media |= self._heads(reading, signal)
        self._readings += 1
        if self._guest is None:
            self._run.log(
                values | media | (self._table() if self._issues.due() else {}), commit=True
            )
            return
        self._guest.put(values, media)
        if self._issues.due():
            self._run.summary.update(self._table())

    def write_issue(self, issue: StabilityIssue) -> None:
        if not self._join():
            return
        self._issues.add(issue)
        if issue.is_alarm:
            text = (
                f"Step {issue.step}, {issue.where}: value {issue.value:.4g} (limit "
                f"{issue.threshold:.4g}). {issue.suggestion}"
            )
            level = self._wandb.AlertLevel[_LEVELS[issue.severity]]
            self._run.alert(title=f"stabmon: {issue.issue_type}", text=text, level=level)

    def close(self) -> None:
        try:
            self._publish_last()
            if self._run is not None and self._guest is None:
                self._run.finish()
        finally:
            if self._guest is not None:
                self._guest.leave(self._publish_last)
            self._wandb = self._run = self._guest = None

    def _join(self) -> bool:
        """Find the run to write to, and return False when closed.

        Not before the first record: until then the training loop may make its own.
        """
        if self._run is None and self._wandb is not None:
            theirs = self._given or self._wandb.run
            self._run = self._make() if theirs is None else theirs
            if theirs is not None:
                self._guest = GuestRows.of(theirs, self._wandb.Table)
                self._guest.join(self._publish_last)
            self._run.define_metric(STEP, hidden=True)
            for names in (
                "attention/*",
                "attention_layers/*",
                "attention_heads/*",
                "attention_heatmap/*",
                "stability/*",
            ):
                self._run.define_metric(names, step_metric=STEP)
        if self._is_finished():
            raise RuntimeError(
                "the W&B run was finished while training went on: call finish() after training"
            )
        return self._run is not None

    def _is_finished(self) -> bool:
        # Run._is_finished: set by finish(). Checked with wandb 0.31, which on a finished run waits
        # 30 s for an answer before it raises. Without the name that wait is back.
        return bool(getattr(self._run, "_is_finished", False))

    def _make(self) -> Any:
        """Make a run of our own that does not become the active one.

        The training loop's own ``wandb.init`` may be still to come.
        """
        run = self._wandb.init(
            project=self._project, config={"stabmon": dict(self._meta)}, reinit="create_new"
        )
        # Run._wl: W&B's setup singleton, which lists active runs. "create_new" does not touch
        # `wandb.run`, but a later `wandb.init` would return the newest active run, which is ours,
        # and log into what we finish. No public way out; checked with wandb 0.31. Without it the
        # run would be shared.
        library: Any = getattr(run, "_wl", None)
        if hasattr(library, "remove_active_run"):
            library.remove_active_run(run)
        return run

    def _publish_last(self) -> None:
        """Upload the table if it lacks an issue; a guest writes no row for it."""
        if self._run is None or not self._issues.due(last_call=True) or self._is_finished():
            return
        if self._guest is None:
            self._run.log(self._table(), commit=False)
        else:
            self._run.summary.update(self._table())

    def _table(self) -> dict[str, Any]:
        """Return the newest issues as a W&B table."""
        return {
            "stability/issues": self._wandb.Table(
                columns=list(COLUMNS), data=self._issues.publish()
            )
        }

    def _heads(self, reading: Reading, signal: str) -> dict[str, Any]:
        """Return the histogram and, when it is due, the heatmap of one signal."""
        matrix = head_matrix(reading, signal)
        finite = matrix[np.isfinite(matrix)]
        media: dict[str, Any] = {}
        if finite.size:
            media[f"attention_heads/{signal}"] = self._wandb.Histogram(finite)
        if self._readings % self._image_every == 0 and matrix.size:
            low, high = colour_range(signal, matrix)
            caption = (
                f"{signal} at step {reading.step}, layers down, heads across, {low:.4g} "
                f"(dark) to {high:.4g} (bright)"
            )
            media[f"attention_heatmap/{signal}"] = self._wandb.Image(
                head_image(matrix, low, high), caption=caption
            )
        return media
