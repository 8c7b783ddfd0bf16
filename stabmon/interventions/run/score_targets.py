"""Find a head's scores from before they grew, and the limits of its number format."""

from __future__ import annotations

import math

import numpy as np

from stabmon._torch.number_formats import LARGEST
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import LayerInfo, StabilityIssue
from stabmon.rules.evidence.baselines import PAST_READINGS, SCORE_FLOOR
from stabmon.rules.evidence.robust_stats import largest


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


def onset(run: TrainingRun, issue: StabilityIssue, head: int | None = None) -> int | None:
    """Return the newest step at which a head's score had not grown yet; None if unknown.

    It is the step that the issue gives, or the knee of the score's course: the reading furthest
    below the line from the first reading to the newest, on a logarithmic scale. Of growth that has
    been slowing down ever since it is the first reading. Scores that leave rows their gradient
    count as one.

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
        return None
    steps = run.history.steps
    if "since_step" in issue.evidence:
        before = np.flatnonzero(steps <= issue.evidence["since_step"])
        return int(steps[before[-1]]) if len(before) else None
    heads = run.history.of_layer(issue.layer)
    scores = run.history.rows("max_logit", slice(None), heads)[:, head]
    known = np.isfinite(scores)
    if known.sum() < 2:
        return None
    at, height = steps[known], np.log(np.maximum(scores[known], SCORE_FLOOR / 2))
    line = np.interp(at, at[[0, -1]], height[[0, -1]])
    return int(at[:-1][np.argmin((height - line)[:-1])])


def largest_until(run: TrainingRun, layer: str, step: int | None) -> np.ndarray:
    """Return ``[H]`` largest scores of a layer's heads in the newest readings up to a step.

    Those of its first readings where the step is not known; NaN where nothing was measured.

    Args:
        run: the run.
        layer: the layer's name.
        step: the step.
    """
    heads = run.history.of_layer(layer)
    scores = run.history.rows("max_logit", slice(None), heads)
    before = scores[run.history.steps <= step][-PAST_READINGS:] if step is not None else scores[:0]
    found = largest(before) if len(before) else np.full(scores.shape[1], np.nan)
    first: np.ndarray = run.history.baseline("max_logit")[heads]
    return np.where(np.isnan(found), first, found)


def baselines(run: TrainingRun, issue: StabilityIssue, head: int | None = None) -> float:
    """Return a head's largest score before it grew; NaN if unknown.

    Growth began as :func:`onset` finds it. Of the readings up to there the newest five count.

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
    since = onset(run, issue, head)
    if since is None and "since_step" in issue.evidence:
        return float("nan")
    return float(largest_until(run, issue.layer, since)[head])
