"""A head's largest score runs away from the head's own past."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, Positive, renamed
from stabmon.records import Severity, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.baselines import (
    PAST_READINGS,
    SCORE_FLOOR,
    Change,
    changes,
    jump_needed,
    loss_fell,
)
from stabmon.rules.evidence.context import advice, circumstances
from stabmon.rules.evidence.forecast import Forecast, forecast_score
from stabmon.rules.evidence.norm_growth import drive
from stabmon.rules.evidence.recovery import fell_below
from stabmon.rules.evidence.robust_stats import largest
from stabmon.rules.symptoms import SCORES, SUSTAINED_GROWTH, Symptom
from stabmon.rules.tracking.history import History

LEAST_SCORE = 2 * SCORE_FLOOR
"""Score from which growth is worth a forecast."""
WITH_WEIGHTS, WITH_SCALE = 1.5, 2.5
"""Times its own past that a score must have grown with what drives it. Where a scale cannot be held
itself, the clip that holds the scores lets them come to twice their past: more is asked, so that it
has something to clip, and then ends the alarm."""


@rule
@renamed(harm="damage_level", still_ill="hysteresis")
@dataclass(frozen=True)
class LogitGrowth(Rule):
    """A head's largest score grew manifold over its own past, faster than heads that learn grow,
    and its rows lost their spread.

    Large scores are no disease: trained heads sit at 300 with near one-hot rows and are right. What
        tells the ill from the
    learning is speed, and what the speed costs. A head that learns, even at a high rate and even
    while it turns one-hot, was never seen to grow more than threefold in 10 optimizer steps or
    sixfold in 50 (scores below 10 not counted); a head that broke grows tenfold in one step, or
    goes on doubling where the learner levels off. So an alarm needs

    - a jump: within two readings, ``jump`` times the largest score of the readings before, more the
      more steps lie between, and the rows lost half their spread, or a quarter of them saturated;
      or
    - a run-away: ``runaway`` times within ``runaway_steps``, most spread lost, a tenth of the rows
      saturated, and the line through the newest readings still rises so that it meets
      ``damage_level`` no later than it took to come here; or
    - harm: a score above ``damage_level`` that still doubles, or that is ``runaway`` times the
      head's first readings, without spread; or
    - a drive, long before any of these: the layer's W_q and W_k grow along themselves, or its scale
      grows, steadily and by more than learning makes them grow
      (:func:`~stabmon.rules.evidence.norm_growth.drive`), and a head's score has grown with them.
      Blames the layer, no head.

    A loss that clearly falls over the same span speaks for learning: growth must then be a quarter
    more. Growth without lost spread, or a line that meets ``damage_level`` within ``horizon``
    readings, is a warning with a forecast.
    """

    symptom: ClassVar[Symptom] = SCORES
    value_of: ClassVar[str] = "max_logit"

    jump: Positive = 4.0
    """Times its own past within one step; plus ``jump`` again for each 100 steps in between, up to
    three times ``jump``.
    """
    runaway: Positive = 8.0
    """Times its own past that a score must grow within few steps; twice as much over
    ``runaway_steps``.
    """
    runaway_steps: Count = 300
    """Steps beyond which growth is slow sharpening: then a score that grew 16-fold doubled in no
    less than 75.
    """
    damage_level: Positive = 1_000.0
    """Score from which training suffers in published runs (Wortsman et al. 2023, Kimi K2); all
    above 1e4 diverged.
    """
    horizon: Count = 20
    """Readings ahead within which a forecast is worth a warning."""
    driven: Positive = 1.5
    """Times its own past that the gain of a layer's scores (scale times squared norm of W_q and
    W_k) must have grown for a drive.
    """
    coherence: Fraction = 0.75
    """Share of what its weights moved that must have gone into their norm, in [0, 1]."""
    hysteresis: Fraction = 0.6
    """Share of the opening level above which an open issue stays open."""

    @classmethod
    def symptom_of(cls, issue: StabilityIssue) -> Symptom:
        return SUSTAINED_GROWTH if issue.head is None else SCORES

    @classmethod
    def is_recovering(cls, issue: StabilityIssue, history: History) -> bool:
        return issue.head is not None and fell_below(issue, history, "max_logit")

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a head, and one a layer that is driven; ``value`` is the largest score,
        ``threshold`` the score at which it is called ill by its own past."""
        score, heads = history.now("max_logit"), len(history.heads)
        if heads == 0 or len(history) < 2:
            return []
        forecast = forecast_score(history, self.damage_level, least=LEAST_SCORE)
        found = _Found.nothing(heads)
        for change in changes(history, least_ratio=self.jump):
            self._judge(history, change, forecast, score, found)
        self._judge_harm(history, score, found)
        found.add(
            forecast.warns(self.horizon * _interval(history)),
            0,
            self.damage_level,
            np.nan,
            np.nan,
            "forecast",
        )
        level = history.open_level("logit_growth")
        found.add(score >= self.hysteresis * level, 0, level, np.nan, np.nan, "still")
        layers = [
            issue
            for layer in history.layers
            if (issue := self._of_layer(history, layer, forecast)) is not None
        ]
        return layers + [
            self._issue(history, n, found, forecast)
            for n in np.flatnonzero(found.rank >= 0).tolist()
        ]

    def _judge(
        self, history: History, change: Change, forecast: Forecast, score: np.ndarray, found: _Found
    ) -> None:
        """Find jumps at one or two readings back, run-aways at more."""
        if change.lag <= 2:
            needed = jump_needed(history, change.steps, self.jump)
            lost = (change.kept <= 0.5) | (change.saturated_rise >= 0.25)
            grown, how = change.ratio >= needed, "jump"
        else:
            patience = 1.25 if loss_fell(history, change.steps) else 1.0
            needed = patience * self.runaway * (1 + change.steps / self.runaway_steps)
            lost = (change.kept <= 0.35) & ~(change.saturated_rise < 0.1)
            rises = (forecast.eta <= change.steps) | (score >= self.damage_level)
            grown, how = (
                (change.ratio >= needed) & (change.steps <= self.runaway_steps) & rises,
                "runaway",
            )
        found.add(grown & lost, 1, needed * change.past_logit, change.ratio, change.kept, how)
        found.add(grown & ~lost, 0, needed * change.past_logit, change.ratio, change.kept, how)

    def _judge_harm(self, history: History, score: np.ndarray, found: _Found) -> None:
        """Find heads above the level of known harm that came there in this run."""
        past = np.maximum(largest(history.signal("max_logit")[:-1][-PAST_READINGS:]), SCORE_FLOOR)
        start = np.maximum(history.baseline("max_logit"), SCORE_FLOOR)
        came = (score >= 2 * past) | (
            score >= self.runaway * start
        )  # it still doubles, or it was not like this at first
        spent = history.now("normalized_entropy") < 0.1
        found.add(
            (score >= self.damage_level) & spent & came,
            1,
            self.damage_level,
            score / np.fmin(past, start),
            np.nan,
            "harm",
        )

    def _of_layer(self, history: History, layer: str, forecast: Forecast) -> StabilityIssue | None:
        """A layer whose scores are driven."""
        found = drive(history, layer, grown=self.driven, coherence=self.coherence)
        if found is None:
            return None
        heads, before = (
            history.of_layer(layer),
            int(np.flatnonzero(history.steps <= found.since)[-1]),
        )
        past = largest(
            history.signal("max_logit")[max(0, before - PAST_READINGS + 1) : before + 1, heads]
        )
        score = history.now("max_logit")[heads]
        level = (WITH_SCALE if found.of_scale else WITH_WEIGHTS) * np.maximum(past, SCORE_FLOOR / 2)
        grown = (score >= level) & (score >= SCORE_FLOOR)
        if not grown.any():
            return None
        head = int(np.nanargmax(np.where(grown, score, np.nan)))
        eta, slope = float(forecast.eta[heads][head]), float(forecast.slope[heads][head])
        what = (
            "the scale of its scores grows"
            if found.of_scale
            else "its W_q and W_k grow along themselves"
        )
        usual = (
            f"Something other than learning drives this layer: {what}. Look for what multiplies "
            "them (weight decay of the wrong sign, "
            "a rate or a penalty of one parameter group, a scale that is written to); until then "
            "hold "
            f"{'the scale (cap_scale)' if found.of_scale else 'their norm (cap_query_key_norm)'}, "
            "or clip its heads (qk_clip)."
        )
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=None,
            issue_type="logit_growth",
            severity="error",
            value=float(score[head]),
            threshold=float(level[head]),
            suggestion=usual if found.of_scale else advice(history, layer, usual),
            evidence={
                "how": "driven",
                "by": "scale" if found.of_scale else "weights",
                "since_step": found.since,
                "gain_times": found.times,
                "coherence": found.coherence,
                "heads_grown": np.flatnonzero(grown).tolist(),
                "log_slope_per_step": slope,
                "eta_interval": [
                    float(forecast.low[heads][head]),
                    float(forecast.high[heads][head]),
                ],
            }
            | circumstances(history, layer, slope),
            eta_steps=eta if np.isfinite(eta) else None,
        )

    def _issue(self, history: History, n: int, found: _Found, forecast: Forecast) -> StabilityIssue:
        layer, head = history.heads[n]
        severity: Severity = "error" if found.rank[n] == 1 else "warning"
        evidence = {
            "how": str(found.how[n]),
            "times_own_past": float(found.ratio[n]),
            "spread_kept": float(found.kept[n]),
            "normalized_entropy": float(history.now("normalized_entropy")[n]),
            "saturated_fraction": float(history.now("saturated_fraction")[n]),
            "log_slope_per_step": float(forecast.slope[n]),
            "eta_interval": [float(forecast.low[n]), float(forecast.high[n])],
        } | circumstances(history, layer, float(forecast.slope[n]))
        eta = float(forecast.eta[n])
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="logit_growth",
            severity=severity,
            value=float(history.now("max_logit")[n]),
            threshold=float(found.level[n]),
            suggestion=advice(
                history,
                layer,
                "Clip this head to its own scores after warm-up (QK-clip: scale W_q and W_k of "
                "the head by sqrt(tau / max_logit) after "
                "each step), or normalise query and key (q, k = rms_norm(q), rms_norm(k)); a "
                "lower rate slows the growth but does "
                "not undo it, and attention dropout is no cure.",
            ),
            evidence=evidence,
            eta_steps=eta if np.isfinite(eta) else None,
        )


@dataclass(eq=False)
class _Found:
    """The strongest finding of each head so far; every array is ``[N]``."""

    rank: np.ndarray
    """-1 nothing, 0 warning, 1 error."""
    level: np.ndarray
    ratio: np.ndarray
    kept: np.ndarray
    how: np.ndarray

    @classmethod
    def nothing(cls, heads: int) -> _Found:
        nan = np.full(heads, np.nan)
        return cls(
            np.full(heads, -1), nan, nan.copy(), nan.copy(), np.full(heads, "", dtype=object)
        )

    def add(
        self, where: np.ndarray, rank: int, level: object, ratio: object, kept: object, how: str
    ) -> None:
        """Note a finding at the heads ``where`` that have no stronger one, nor an earlier one as
        strong.
        """
        new = where & (self.rank < rank)
        for array, value in (
            (self.rank, rank),
            (self.level, level),
            (self.ratio, ratio),
            (self.kept, kept),
            (self.how, how),
        ):
            array[new] = np.broadcast_to(np.asarray(value), new.shape)[new]


def _interval(history: History) -> float:
    """Median optimizer steps between readings."""
    return float(np.median(np.diff(history.steps[-20:])))
