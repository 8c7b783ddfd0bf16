"""Scalars as metrics and issues as an artifact in MLflow."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabmon._storage import strict_json
from stabmon.incidents import intervention_text, is_change
from stabmon.records import StabilityIssue
from stabmon.sinks.base import sink
from stabmon.sinks.dashboards.scalar_log import ScalarLog
from stabmon.sinks.issue_table import COLUMNS, RecentIssues

_METRICS_PER_CALL = 1000
"""MLflow's limit on metrics in one call."""


@sink
class MlflowSink(ScalarLog):
    """Log to the active MLflow run, or to a run of its own.

    Only a run of its own is ended on closing. Metrics are sent by MLflow's background thread; the
    next sampled step waits for them, so that a slow server cannot pile them up and an error is
    noticed. Characters that MLflow does not take in a metric's name become ``_``. Issues are the
    artifact ``stabmon/issues.json``, interventions ``stabmon/interventions.json``; the tags
    ``stabmon.issues``, ``stabmon.alarms`` and ``stabmon.interventions`` count them, and the metric
    ``stability/intervention`` is 1 at the step of an intervention.

    Args:
        experiment: experiment of a run of our own; None for ``MLFLOW_EXPERIMENT_NAME``, or
            ``stabmon`` where it is not set.
        issues_seconds: least wall time between two uploads of the newest 1000 issues; the last is
            at closing.

    Raises:
        ImportError: on opening, where mlflow is not installed.
        RuntimeError: on opening, where the tracking store cannot be used.
    """

    in_background = True
    """The client knows its run by id, whichever thread calls it."""

    def __init__(self, *, experiment: str | None = None, issues_seconds: float = 300.0) -> None:
        super().__init__(every_layer=True)
        self._experiment = experiment
        self._issues = RecentIssues(issues_seconds)
        self._client: Any = None
        self._mlflow: Any = None
        self._run_id = ""
        self._own = False
        self._sending: list[Any] = []
        self._interventions: deque[Mapping[str, Any]] = deque(maxlen=1000)
        self._counts = {"issues": 0, "alarms": 0, "interventions": 0}

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        try:
            import mlflow
        except ImportError as error:
            raise ImportError('mlflow is not installed: pip install "stabmon[mlflow]"') from error
        active = mlflow.active_run()
        self._own = active is None
        try:
            client = mlflow.MlflowClient()
            self._run_id = self._start(client) if active is None else active.info.run_id
        except mlflow.MlflowException as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"MLflow cannot use {mlflow.get_tracking_uri()} ({reason}): set "
                "MLFLOW_TRACKING_URI to a server, install the full mlflow for sqlite, or set "
                "MLFLOW_ALLOW_FILE_STORE=true for a file: store"
            ) from error
        self._mlflow, self._client = mlflow, client

    def log(self, step: int, scalars: dict[str, float]) -> None:
        if self._client is None:
            return
        self._wait()
        # while nothing is being sent: an upload reads the run, and a file store's half-written
        # metrics fail it
        if self._issues.due():
            self._publish()
        self._send(scalars, step)

    def write_issue(self, issue: StabilityIssue) -> None:
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        if self._client is None:
            return
        for issue in issues:
            self._issues.add(issue)
            self._counts["issues"] += issue.state == "opened"
            self._counts["alarms"] += issue.is_alarm

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        if self._client is None:
            return
        self._interventions.append({**record, "text": intervention_text(record)})
        self._counts["interventions"] += is_change(record)
        super().write_intervention(record)

    def close(self) -> None:
        if self._client is None:
            return
        try:
            self._wait()
            if self._issues.due(last_call=True) or self._interventions:
                self._publish()
            if self._own:
                self._client.set_terminated(self._run_id)
        finally:
            self._client = None

    def _start(self, client: Any) -> str:
        """Create a run that is not the active one, and return its id.

        The training script may still start its own.
        """
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "stabmon")
        known = client.get_experiment_by_name(name)
        return str(
            client.create_run(
                client.create_experiment(name) if known is None else known.experiment_id
            ).info.run_id
        )

    def _send(self, scalars: Mapping[str, float], step: int) -> None:
        """Hand scalars to MLflow's background thread."""
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        metrics = [
            metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step)
            for name, value in scalars.items()
        ]
        for first in range(0, len(metrics), _METRICS_PER_CALL):
            batch = metrics[first : first + _METRICS_PER_CALL]
            self._sending.append(
                self._client.log_batch(self._run_id, metrics=batch, synchronous=False)
            )

    def _wait(self) -> None:
        """Wait until the metrics sent last have arrived, or raise their error."""
        while self._sending:
            self._sending.pop().wait()

    def _publish(self) -> None:
        """Upload the newest issues and their counts."""
        issues = [dict(zip(COLUMNS, row, strict=True)) for row in self._issues.publish()]
        self._client.log_text(
            self._run_id,
            strict_json.dumps({"schema_version": 1, "issues": issues}),
            "stabmon/issues.json",
        )
        if self._interventions:
            kept = {"schema_version": 1, "interventions": list(self._interventions)}
            self._client.log_text(
                self._run_id, strict_json.dumps(kept), "stabmon/interventions.json"
            )
        for name, count in self._counts.items():
            self._client.set_tag(self._run_id, f"stabmon.{name}", str(count))
