"""Find a head's scores from before they grew, and the limits of its number format."""

from __future__ import annotations

import numpy as np

from stabmon._torch.number_formats import LARGEST
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import StabilityIssue
from stabmon.rules.base import rule_of
from stabmon.rules.evidence.baselines import PAST_READINGS


def largest_product(dtype: str) -> float:
    """Return the ``q·k`` before the scale that a head may reach in a format.

    A quarter of the largest value of the format, of float32 where the format is not known.
    """
    return LARGEST.get(dtype, LARGEST["float32"]) / 4


def baselines(run: TrainingRun, issue: StabilityIssue, head: int | None = None) -> float:
    """Return a head's largest score before it grew; NaN if unknown.

    Growth began at the step that the issue gives, or where the head's score was last at or below
    the level that the issue was measured against (half of the present score, where the issue has no
    level). Of the readings up to there the newest five count.

    Args:
        run: the run.
        issue: an issue of the head, or of its layer.
        head: the head, where the issue names its layer alone.
    """
    head = issue.head if issue.head is not None else head
    if (
        issue.layer is None
        or head is None
        or issue.layer not in run.history.layers
        or issue.evidence.get("from_the_start")
    ):
        return float("nan")
    scores = run.history.signal("max_logit")[:, run.history.of_layer(issue.layer)][:, head]
    if "since_step" in issue.evidence:
        before = np.flatnonzero(run.history.steps <= issue.evidence["since_step"])
        return (
            float(np.nanmax(scores[: before[-1] + 1][-PAST_READINGS:]))
            if len(before)
            else float("nan")
        )
    times = issue.evidence.get("times_own_past", issue.evidence.get("score_times_own_past"))
    reports_score = getattr(rule_of(issue.issue_type), "value_of", None) == "max_logit"
    now = issue.evidence.get("max_logit", issue.value if reports_score else scores[-1])
    known = isinstance(times, (int, float)) and np.isfinite(times) and times > 1
    level = 1.001 * now / times if known else now / 2
    before = np.flatnonzero(scores <= level)
    if len(before):
        return float(np.nanmax(scores[: before[-1] + 1][-PAST_READINGS:]))
    return float(run.history.baseline("max_logit")[run.history.of_layer(issue.layer)][head])
