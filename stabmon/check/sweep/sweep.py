"""The largest learning rate of a recipe with stable attention.

A few dozen real steps at each of several rates, and a fit. The largest score after so many steps
grows with the rate as a power law (Wortsman et al. 2023, arXiv:2309.14322, figures 1 and 3). The
rate's limit is where that line crosses the score at which a typical row hardly learns any more: the
largest of n normal scores is ``sigma sqrt(2 ln n)`` and stands ``sigma / sqrt(2 ln n)`` above the
next, and with a gap g the softmax passes ``2 exp(-g)`` of a gradient. A tenth is passed at ``g = ln
20``, so at a largest score of ``2 ln(n) ln(20)``: 25 for 64 keys, 50 for 4096. Scores go on growing
after a few dozen steps: in small models they came to 2.5 times that, where a thousandth is passed,
and the runs failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from stabmon.check.measuring.short_run import ShortRun, train_briefly
from stabmon.tiny.recipe import Recipe
from stabmon.tiny.statistics import student_t

PASSES = 0.1
"""Share of a gradient passed by a typical row at the limit."""
STEPS, WARMUP = 48, 16
NEAR = 3.0
"""Largest logarithmic distance from the limit of scores in the fit.

Powers of e; the law bends further away.
"""


@dataclass(frozen=True)
class Sweep:
    """Runs of a sweep and the limit fitted to them. R runs."""

    rates: tuple[float, ...]
    """Peak rates ``[R]``."""
    scores: tuple[float, ...]
    """Largest score of any head at each run's last sample, ``[R]``.

    inf where the run ended in a loss that is not finite.
    """
    saturated: tuple[float, ...]
    """Share of all rows without a gradient then, ``[R]``."""
    losses: tuple[float, ...]
    """Mean loss over each run's last eighth, ``[R]``."""
    score_limit: float
    limit: float | None
    """Rate for scores of ``score_limit``; None where no tried rate reaches them."""
    low: float | None
    """Lower end of a 90 % interval of ``limit``."""
    high: float | None
    exponent: float | None
    """Exponent of the rate in the growth of scores."""
    steps: int
    width: int
    """Width of the trained model."""
    full_width: int
    """Width of the model asked about."""

    @property
    def full_limit(self) -> float | None:
        """Return the limit at full width.

        It falls as one over the width under Adam (Yang et al. 2022, arXiv:2203.03466).
        """
        return None if self.limit is None else self.limit * self.width / self.full_width

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        runs = [
            {"rate": rate, "largest_score": score, "saturated": share, "loss": loss}
            for rate, score, share, loss in zip(
                self.rates, self.scores, self.saturated, self.losses, strict=True
            )
        ]
        names = (
            "score_limit",
            "limit",
            "low",
            "high",
            "exponent",
            "steps",
            "width",
            "full_width",
            "full_limit",
        )
        return {"runs": runs} | {name: getattr(self, name) for name in names}


def score_limit(keys: int) -> float:
    """Return the largest score of rows typically passing a tenth of a gradient.

    >>> round(score_limit(64), 1)
    24.9
    """
    return 2 * math.log(max(keys, 2)) * math.log(2 / PASSES)


def sweep_rates(
    make: Callable[[int], nn.Module],
    batches: Callable[[int, int], Sequence[dict[str, Tensor]]],
    recipe: Recipe,
    dtype: str,
    keys: int,
    *,
    around: float = 1e-3,
    widths: tuple[int, int] = (1, 1),
    on_run: Callable[[ShortRun], None] = lambda run: None,
) -> Sweep:
    """Train at several rates around ``around`` and fit the limit.

    Coarse steps of the rate until the limit is bracketed, then fine ones about it.

    Args:
        make: from a seed to a fresh model.
        batches: from (steps, seed) to keyword arguments of its forward, one mapping per step.
        recipe: the optimizer; its warm-up is cut to ``WARMUP`` steps, and its rate does not fall
            within these few.
        dtype: precision to train in.
        keys: number of keys of a row.
        around: the rate to begin with.
        widths: of the trained model, and of the one asked about.
        on_run: called with each run as it ends.
    """
    short = replace(recipe, schedule="constant", warmup=min(WARMUP, max(recipe.warmup, 1)))
    limit = score_limit(keys)
    runs: list[tuple[ShortRun, float]] = []

    def run(rate: float) -> float:
        seed = len(runs)
        done = train_briefly(lambda: make(seed), batches(STEPS, seed), short, rate, dtype)
        runs.append((done, _last_score(done)))
        on_run(done)
        return runs[-1][1]

    above, below = _bracket(run, around, limit)
    if above is not None and below is not None:
        for share in (1 / 4, 1 / 2, 3 / 4, -1 / 4, 5 / 4):
            run(below * (above / below) ** share)
    runs.sort(key=lambda each: each[0].rate)
    found, low, high, exponent = fit_limit(
        [each.rate for each, _ in runs], [score for _, score in runs], limit
    )
    return Sweep(
        rates=tuple(each.rate for each, _ in runs),
        scores=tuple(score for _, score in runs),
        saturated=tuple(float(np.nanmean(each.saturated[-1])) for each, _ in runs),
        losses=tuple(float(np.mean(each.losses[-STEPS // 8 :])) for each, _ in runs),
        score_limit=limit,
        limit=found,
        low=low,
        high=high,
        exponent=exponent,
        steps=STEPS,
        width=widths[0],
        full_width=widths[1],
    )


def fit_limit(
    rates: Sequence[float], scores: Sequence[float], limit: float
) -> tuple[float | None, float | None, float | None, float | None]:
    """Fit the rate for a score of ``limit``, by a power law.

    Points further than ``NEAR`` from the limit, in logarithms, are left out as far as four remain.
    The interval holds the scatter of single runs about the line as well as the line's own
    uncertainty.

    Args:
        rates: peak rates ``[R]``.
        scores: largest score of each run, ``[R]``.
        limit: the score to reach.

    Returns:
        The rate, the lower and upper end of its 90 % interval, and the exponent; None throughout
        where no score reaches the limit.
    """
    finite = [
        (math.log(rate), math.log(score / limit))
        for rate, score in zip(rates, scores, strict=True)
        if 0 < score < math.inf
    ]
    if not any(score >= limit for score in scores):
        return None, None, None, None
    near = sorted(finite, key=lambda point: abs(point[1]))
    near = [point for place, point in enumerate(near) if place < 4 or abs(point[1]) <= NEAR]
    if len(near) < 3:
        first = min(rate for rate, score in zip(rates, scores, strict=True) if score >= limit)
        return first, None, first, None
    x, y = np.array(near).T
    slope, intercept = np.polyfit(x, y, 1)
    if slope <= 0:
        return None, None, None, None
    at = -intercept / slope
    scatter = math.sqrt(float(((y - slope * x - intercept) ** 2).sum()) / (len(x) - 2))
    spread = (
        scatter
        / slope
        * math.sqrt(1 + 1 / len(x) + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    )
    half = student_t(0.9, len(x) - 2) * spread
    return math.exp(at), math.exp(at - half), math.exp(at + half), float(slope)


def _bracket(
    run: Callable[[float], float], around: float, limit: float
) -> tuple[float | None, float | None]:
    """Bracket the limit by two rates a factor 4 apart.

    Above, below; None for the one that was not found.
    """
    rate, score = around, run(around)
    for _ in range(6):
        step = 4.0 if score < limit else 0.25
        following = run(rate * step)
        if (following >= limit) != (score >= limit):
            return max(rate, rate * step), min(rate, rate * step)
        rate, score = rate * step, following
    return (None, rate) if score < limit else (rate, None)


def _last_score(run: ShortRun) -> float:
    last = run.scores[-1]
    return float(np.nanmax(last)) if run.finite and np.isfinite(last).any() else math.inf
