"""Scalars, incidents, interventions and every head in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.incidents import Incident, is_change
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.dashboards.head_pictures import HeadPictures, Picture
from stabmon.sinks.dashboards.panels import LAYER_SIGNALS, LAYERS, MARKER, LayerCurves
from stabmon.sinks.dashboards.wandb_metrics import STEP, WandbMetrics
from stabmon.sinks.delivery.slow_start import SlowStart
from stabmon.sinks.head_images import head_matrix, signal_names
from stabmon.sinks.issue_table import (
    AUDIT_COLUMNS,
    COLUMNS,
    RecentInterventions,
    RecentIssues,
)
from stabmon.sinks.wandb_guest import GuestRows

_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR", "critical": "ERROR"}


@sink
class WandbSink(Sink):
    """Log to the active W&B run, or to a run of its own.

    The run is found at the first record; one of our own is made where none is active then. Where
    ``wandb.init`` has not returned within 10 s, the records wait for it and training goes on.
    Everything of ours has the step metric ``stabmon/step`` and never sets W&B's own step, so
    nothing is dropped as out of order. A run that is not ours is never finished and no row of it
    committed while it goes on: a reading rides on the row that its owner commits next, and those
    that found none are added as the run ends (:class:`~stabmon.sinks.wandb_guest.GuestRows`). A run
    of our own does not become ``wandb.run``, and is finished on closing.

    The first screen has few panels: the state of the run, one extreme of each telling signal, and
    one image of every head with its history. Other scalars are logged and hidden from automatic
    panels. Of a model with more than 4 layers, only the layers that issues name have curves.

    Issues and interventions go into the tables ``stability/issues`` and
    ``stability/interventions``; ``stability/intervention`` is 1 at the step of an intervention.
    Each incident raises at most a few W&B alerts, of which W&B lets one a minute through for a
    title. Settings and versions are the entry ``stabmon`` of the run's configuration. Modes and
    folders are W&B's own (``WANDB_MODE``, ``WANDB_DIR`` …).

    Args:
        run: a ``wandb.Run`` to write to instead, which is treated as somebody else's.
        project: project of a run of our own.
        per_head: log the values of all heads, one histogram per signal and sampled step
            (``attention_heads/<signal>``) and one image per signal
            (``attention_heatmap/<signal>``), instead of one image of entropy and largest score;
            and, hidden, the curves of every layer.
        image_every: sampled steps from one image to the next; there is one more at each alarm.
        all_layers: log and show the curves of every layer.
        table_seconds: least wall time between two uploads of the tables of the newest 1000 issues
            and interventions; the last is at closing.

    Raises:
        ImportError: on opening, where wandb is not installed.
    """

    in_background = False
    """A row is shared with the training loop, whose own log commits it."""

    def __init__(
        self,
        *,
        run: Any = None,
        project: str = "stabmon",
        per_head: bool = False,
        image_every: int = 10,
        all_layers: bool = False,
        table_seconds: float = 300.0,
    ) -> None:
        self._given = run
        self._project = project
        self._per_head = per_head
        self._image_every = image_every
        self._metrics = WandbMetrics(show_layers=all_layers)
        self._all_layers = all_layers
        self._issues = RecentIssues(table_seconds)
        self._interventions = RecentInterventions(table_seconds)
        self._wandb: Any = None
        self._run: Any = None
        self._start: SlowStart[Any] | None = None
        self._guest: GuestRows | None = None
        self._meta: dict[str, Any] = {}
        self._begin()

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        try:
            import wandb

            # a folder of offline runs called "wandb" imports as an empty package
            wandb.init  # noqa: B018
        except (ImportError, AttributeError) as error:
            raise ImportError('wandb is not installed: pip install "stabmon[wandb]"') from error
        self._wandb, self._meta = wandb, dict(meta)
        self._begin()

    def _begin(self) -> None:
        """Forget an earlier run."""
        self._pictures = HeadPictures(each_signal=self._per_head, every=self._image_every)
        self._layers = LayerCurves(every=self._all_layers or self._per_head)
        self._intervened_at: int | None = None

    def amend(self, meta: Mapping[str, Any]) -> None:
        self._meta |= meta
        if self._run is not None and not self._is_finished():
            self._describe()

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        if not self._join():
            return
        values: dict[str, Any] = {STEP: reading.step, **self._layers.chosen(scalars)}
        if self._intervened_at is not None:
            values[MARKER] = float(self._intervened_at == reading.step)
        self._metrics.define(self._run, values)
        media = self._media(self._pictures.add(reading))
        if self._per_head:
            media |= self._histograms(reading)
        tables = self._tables()
        if self._guest is None:
            self._run.log(values | media | tables, commit=True)
        else:
            self._guest.put(values, media)
            if tables:
                self._run.summary.update(tables)

    def write_issue(self, issue: StabilityIssue) -> None:
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        if not self._join():
            return
        for issue in issues:
            self._issues.add(issue)
        for layer in self._layers.note(issues):
            self._metrics.show(self._run, [f"{LAYERS}{layer}/{name}" for name in LAYER_SIGNALS])

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        if not self._join():
            return
        for incident in incidents:
            if incident.alerts:
                self._run.alert(
                    title=f"stabmon: {incident.headline}",
                    text="\n\n".join(
                        filter(None, (incident.text(), incident.advice, incident.code))
                    ),
                    level=self._wandb.AlertLevel[_LEVELS[incident.severity]],
                )
        alarms = [each for each in incidents if each.is_alarm]
        if any(each.state == "opened" or each.alerts for each in alarms):
            step = alarms[0].step
            self._pictures.mark("alarm", step)
            self._log_event(step, {}, self._media(self._pictures.draw()))

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        if not self._join():
            return
        step = int(record["step"])
        self._interventions.add(record)
        if is_change(record):
            self._intervened_at = step
            self._pictures.mark("intervention", step)
            self._metrics.define(self._run, [MARKER])
            self._log_event(step, {MARKER: 1.0}, {})

    def close(self) -> None:
        try:
            self._publish_last()
            if self._run is not None and self._guest is None:
                self._run.finish()
        finally:
            if self._guest is not None:
                self._guest.leave(self._publish_last)
            if self._run is None and self._start is not None:
                self._start.abandon(lambda run: run.finish())
            self._wandb = self._run = self._guest = self._start = None

    def _join(self) -> bool:
        """Find the run to write to, and return False when closed.

        Not before the first record: until then the training loop may make its own.
        """
        if self._run is None and self._wandb is not None:
            theirs = self._given or self._wandb.run
            if theirs is None and self._start is None:
                self._start = SlowStart("wandb.init", self._make)
            self._run = self._start.result() if theirs is None and self._start else theirs
            if theirs is not None:
                self._guest = GuestRows.of(theirs, self._wandb.Table)
                self._guest.join(self._publish_last)
            self._metrics.begin(self._run)
            self._describe()
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
        run = self._wandb.init(project=self._project, reinit="create_new")
        # Run._wl: W&B's setup singleton, which lists active runs. "create_new" does not touch
        # `wandb.run`, but a later `wandb.init` would return the newest active run, which is ours,
        # and log into what we finish. No public way out; checked with wandb 0.31. Without it the
        # run would be shared.
        library: Any = getattr(run, "_wl", None)
        if hasattr(library, "remove_active_run"):
            library.remove_active_run(run)
        return run

    def _describe(self) -> None:
        """Set the entry ``stabmon`` of the run's configuration."""
        self._run.config.update({"stabmon": dict(self._meta)}, allow_val_change=True)

    def _log_event(self, step: int, scalars: Mapping[str, float], media: Mapping[str, Any]) -> None:
        """Log what happened at a step, beside its reading."""
        if not scalars and not media:
            return
        if self._guest is None:
            self._run.log({STEP: step, **scalars, **media}, commit=True)
        else:
            self._guest.add(STEP, {STEP: step, **scalars}, media)

    def _publish_last(self) -> None:
        """Upload what waits: tables that lack a row, and an image of the newest readings.

        A guest writes no row for it.
        """
        if self._run is None or self._is_finished():
            return
        media = self._media(self._pictures.draw_if_due())
        tables = self._tables(last_call=True)
        if self._guest is not None:
            self._run.summary.update(media | tables)
            return
        if media:
            self._log_event(self._pictures.newest_step, {}, media)
        if tables:
            self._run.log(tables, commit=False)

    def _tables(self, *, last_call: bool = False) -> dict[str, Any]:
        """Return the tables of newest issues and interventions that are due."""
        return {
            f"stability/{name}": self._wandb.Table(columns=list(columns), data=rows.publish())
            for name, columns, rows in (
                ("issues", COLUMNS, self._issues),
                ("interventions", AUDIT_COLUMNS, self._interventions),
            )
            if rows.due(last_call=last_call)
        }

    def _media(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """Return pictures as W&B images."""
        return {
            f"attention_heatmap/{each.name}": self._wandb.Image(each.image, caption=each.caption)
            for each in pictures
        }

    def _histograms(self, reading: Reading) -> dict[str, Any]:
        """Return the histogram of each signal with a finite value."""
        finite = {
            name: matrix[np.isfinite(matrix)]
            for name in signal_names(reading)
            for matrix in (head_matrix(reading, name),)
        }
        return {
            f"attention_heads/{name}": self._wandb.Histogram(values)
            for name, values in finite.items()
            if values.size
        }
