"""Base of sinks that log scalars by step, and know no other kind of record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stabmon.incidents import is_change
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink
from stabmon.sinks.dashboards.panels import MARKER, LayerCurves


class ScalarLog(Sink):
    """Scalars of readings, and a marker of interventions, to a logger by :meth:`log`.

    Of a model of many layers only those that issues name are logged. The marker is 1 at the step of
    an intervention and 0 at later readings.

    Args:
        every_layer: log the scalars of every layer.

    Example:
        >>> class Printed(ScalarLog):
        ...     def log(self, step, scalars):
        ...         print(step, scalars)
        >>> sink = Printed()
        >>> sink.write_intervention({"action": "applied", "step": 3})
        3 {'stability/intervention': 1.0}
        >>> sink.write_reading(Reading(4, None, {}), {"stability/risk": 0.5})
        4 {'stability/risk': 0.5, 'stability/intervention': 0.0}
    """

    in_background = False
    """Loggers of the training loop are called in its own thread, between its own calls."""

    def __init__(self, *, every_layer: bool = False) -> None:
        self._layers = LayerCurves(every=every_layer)
        self._intervened_at: int | None = None

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars at an optimizer step."""
        raise NotImplementedError

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        values = self._layers.chosen(scalars)
        if self._intervened_at is not None:
            values[MARKER] = float(self._intervened_at == reading.step)
        self.log(reading.step, values)

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        self._layers.note(issues)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        if is_change(record):
            self._intervened_at = int(record["step"])
            self.log(self._intervened_at, {MARKER: 1.0})
