"""Find a head's scores from before they grew, and the limits of its number format."""

from __future__ import annotations

import math

import numpy as np

from stabmon._torch.number_formats import LARGEST
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import LayerInfo, StabilityIssue
from stabmon.rules.base import rule_of
from stabmon.rules.evidence.baselines import PAST_READINGS


def largest_score(info: LayerInfo | None) -> float:
    """Return the score that a head may reach in the number formats of its layer.

    Its product of query and key may come to a quarter of the largest value of the kernel's format;
    an exponential whose row's maximum is not subtracted, to the root of the largest value of its
    own.

    Args:
        info: the layer's facts; None where it is not known, which sets no limit.

    Example:
        >>> layer = LayerInfo(4, 16, 0.25, "float32", fused=False, exp_dtype="float16")
        >>> round(largest_score(layer), 2)
        5.54
    """
    if info is None:
        return math.inf
    product = LARGEST.get(info.dtype, LARGEST["float32"]) / 4 * info.scale
    if info.exp_dtype is None:
        return product
    return min(product, math.log(LARGEST.get(info.exp_dtype, LARGEST["float32"])) / 2)


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
