"""Alarms of the shipped rules and risk, from kept readings."""

from __future__ import annotations

from stabmon.records import StabilityIssue
from tests.bench.replay import Sampling, alarms
from tests.bench.testbed.cases import Case


def alarms_of(case: Case, every: int) -> list[StabilityIssue]:
    """Return every alarm of a run of which one step in ``every`` is sampled, in order."""
    return [issue for each in alarms(case.run.readings, Sampling(every)) for issue in each]
