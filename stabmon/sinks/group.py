"""Several sinks as one, of which a slow or failing one hinders nobody."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabmon.incidents import Incident
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink
from stabmon.sinks.delivery.calls import call_of, is_heard
from stabmon.sinks.delivery.delivery import PROMPT, Delivery

_FLUSH = 2.0
"""Seconds that :meth:`SinkGroup.flush` waits at most."""


class SinkGroup(Sink):
    """Several sinks; a slow or failing one hinders neither the others nor training.

    **Threads.** A sink is called in a daemon thread of its own, with records that nobody changes
    any more, unless it has ``in_background`` False, as the console and Weights & Biases have. All
    are opened on the calling thread.

    **Order.** A sink receives its records one at a time, in the order in which they were written
    here. Between sinks there is no order.

    **Durability.** A call here waits up to 20 ms for sinks that keep up, so that their records are
    written when it returns; for a sink whose last call took longer, or that fails, it does not wait
    at all. :meth:`flush` waits up to 2 s, :meth:`close` as long as a sink answers within 10 s, and
    60 s at most. The interpreter's exit waits 5 s for a group that was not closed. A kill loses
    what waits.

    **Bounds.** 64 MiB or 10,000 records wait for a sink. Then the oldest readings are dropped
    first, and then incidents, metadata, interventions and issues.

    **Failures.** A failure is logged once. A call that raises an ``OSError`` is made again after
    0.5, 1, 2 … 60 s, for ever; what another error meets is lost. Lost records are a gap, which the
    sink is given (:meth:`Sink.write_gap`) and the log names once it works again. Only a sink that
    cannot be opened for want of a package or a setting is left out.

    Args:
        sinks: the sinks, in the order in which they are written.

    Example:
        >>> from stabmon.sinks import SINKS
        >>> group = SinkGroup([SINKS["jsonl"](), SINKS["console"]()])
        >>> group.open(None, {})
        >>> [type(each).__name__ for each in group.sinks]
        ['JsonlSink', 'ConsoleSink']
        >>> group.close()
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._deliveries = [Delivery(each) for each in sinks]
        self._step = 0
        self.failed: dict[str, str] = {}
        """Last error of each sink that was left out or has lost records, by class name."""
        self.troubled: set[str] = set()
        """Class names of the sinks that have failed at least once."""

    @property
    def sinks(self) -> list[Sink]:
        """The sinks that are still written to."""
        return [each.sink for each in self._deliveries]

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        """Open every sink; see :meth:`Sink.open`."""
        for each in list(self._deliveries):
            try:
                each.sink.open(run_dir, meta)
            except OSError as error:
                each.open_later(call_of("open", (run_dir, dict(meta)), self._step), error)
            except Exception as error:
                each.failed(error, is_final=True)
                self._deliveries.remove(each)
                self.failed[each.name] = each.last_error
                self.troubled.add(each.name)
                each.leave_out()
        self._note_troubled()

    def amend(self, meta: Mapping[str, Any]) -> None:
        """Give new entries of meta.json to every sink; see :meth:`Sink.amend`."""
        self._each("amend", meta)

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        """Write one sampled step to every sink; see :meth:`Sink.write_reading`."""
        self._step = getattr(reading, "step", self._step)
        self._each("write_reading", reading, scalars)

    def write_issue(self, issue: StabilityIssue) -> None:
        """Write one issue to every sink; see :meth:`Sink.write_issue`."""
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        """Write the issues of one step to every sink; see :meth:`Sink.write_issues`."""
        if issues:
            self._each("write_issues", issues)

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        """Write the incidents of one step to every sink; see :meth:`Sink.write_incidents`."""
        if incidents:
            self._each("write_incidents", incidents)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        """Write one audit record to every sink; see :meth:`Sink.write_intervention`."""
        self._each("write_intervention", record)

    def flush(self, seconds: float = _FLUSH) -> bool:
        """Wait until what was written has reached every sink that works and answers.

        Args:
            seconds: longest time to wait.

        Returns:
            Whether nothing waits any more.
        """
        deadline = time.monotonic() + seconds
        written = [each.flush(deadline) for each in self._deliveries]  # none is left out
        return all(written)

    def close(self) -> None:
        """Write the records that wait, close every sink, and report lost records in the log."""
        for each in self._deliveries:
            each.begin_close()
        for each in self._deliveries:
            each.close()
            if each.is_troubled:
                self.troubled.add(each.name)
            if each.gaps.lost or each.ended_badly:
                self.failed[each.name] = each.last_error
        self._deliveries.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        heard = [each for each in self._deliveries if is_heard(each.sink, method)]
        if not heard:
            return
        call = call_of(method, arguments, self._step)
        if any(each.in_background for each in heard):
            frozen = call.frozen()
        for each in heard:
            each.put(frozen if each.in_background else call)
        deadline = time.monotonic() + PROMPT
        for each in heard:
            if each.in_background:
                each.settle(deadline)
        self._note_troubled()

    def _note_troubled(self) -> None:
        self.troubled |= {each.name for each in self._deliveries if each.is_troubled}
