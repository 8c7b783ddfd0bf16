"""Issues of the runs that a callback has watched before the present one."""

from __future__ import annotations

from collections.abc import Sequence

from stabmon.records import StabilityIssue


def without_restored(
    earlier: Sequence[StabilityIssue], restored: Sequence[StabilityIssue]
) -> list[StabilityIssue]:
    """Leave out the issues that a resumed monitor has taken over from a checkpoint, and so counts
    itself.
    """
    known = {(issue.step, issue.key, issue.state) for issue in restored}
    return [issue for issue in earlier if (issue.step, issue.key, issue.state) not in known]
