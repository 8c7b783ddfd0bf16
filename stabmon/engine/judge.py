"""Run the rules on a reading, and write the reading and its issues to the sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stabmon.diagnosis import Diagnosis
from stabmon.engine.recording.recorder import Recorder
from stabmon.records import Reading
from stabmon.rules.tracking.issue_tracker import IssueTracker


def judge(
    reading: Reading,
    tracker: IssueTracker,
    recorder: Recorder,
    *,
    unseen: Mapping[str, str],
    scalars: Mapping[str, float],
) -> Diagnosis:
    """Run the rules on a reading and write both to the sinks.

    Args:
        reading: the newest reading.
        tracker: the rules and their open issues.
        recorder: writes the reading, where it is of a sampled step, and the issues.
        unseen: modules with attention that is not seen, by name, in words.
        scalars: further scalars of a sampled step, written as ``stability/<name>``.
    """
    issues = tracker.update(reading)
    reading = replace(reading, risk=tracker.risks)
    recorder.keep(issues)
    open_issues = tracker.open_issues
    if reading.sampled:
        recorder.write_reading(reading, open_issues, **scalars)
    incidents = recorder.write_issues(issues)
    return Diagnosis(
        reading.step,
        tuple(issues),
        reading.layers,
        tuple(tracker.history.readings),
        open_issues,
        dict(unseen),
        incidents,
    )
