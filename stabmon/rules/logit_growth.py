"""Growth of attention logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from stabmon.rules.evidence.context import advice, context_of
from stabmon.rules.evidence.forecast import Forecast, forecast_score
from stabmon.rules.evidence.head_findings import HeadFindings
from stabmon.rules.evidence.norm_growth import sustained_growth
from stabmon.rules.evidence.recovery import fell_below
from stabmon.rules.evidence.robust_stats import largest
from stabmon.rules.symptoms import SCORES, SUSTAINED_GROWTH, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import EVERY_READING, LooksBack
from stabmon.rules.wording.code_lines import guard
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import growth, known, number, past

LEAST_SCORE = 2 * SCORE_FLOOR
"""Score from which growth is worth a forecast."""
WITH_WEIGHTS, WITH_SCALE = 1.5, 2.5
"""Growth of a score with its weights or its scale, as a multiple of its own past.

Where a scale cannot be held itself, the clip that holds the scores lets them come to twice their
past: more is asked, so that it has something to clip, and then ends the alarm.
"""

CLIP = (
    "Clip this head to its own scores after warm-up (QK-clip: scale W_q and W_k of "
    "the head by sqrt(tau / max_logit) after each step), or normalise query and key "
    "(q, k = rms_norm(q), rms_norm(k)); a lower rate slows the growth but does not "
    "undo it, and attention dropout does not help."
)
"""Advice on a head whose scores grew."""


@rule
@renamed(harm="damage_level", still_ill="hysteresis")
@dataclass(frozen=True)
class LogitGrowth(Rule):
    """Growth of a head's scores beyond that of learning.

    Large scores are no failure by themselves: trained heads sit at 300 with near one-hot rows and
    are right. Speed, and what the speed costs, separate the anomalous from the learning. A head
    that learns, even at a high rate and even while it turns one-hot, was never seen to grow more
    than threefold in 10 optimizer steps or sixfold in 50 (scores below 10 not counted); a head that
    broke grows tenfold in one step, or goes on doubling where the learner levels off. So an alarm
    is one of:

    - jump: within two readings, ``jump`` times the largest score of the readings before, more the
      more steps lie between, and the rows lost half their entropy, or a quarter of them saturated;
    - runaway: ``runaway`` times within ``runaway_steps``, most entropy lost, a tenth of the rows
      saturated, and the line through the newest readings still rises so that it meets
      ``damage_level`` no later than it took to come here;
    - damage: a score above ``damage_level`` that still doubles, or that is ``runaway`` times the
      head's first readings, with little entropy left;
    - sustained growth, long before any of these: the layer's W_q and W_k grow along themselves, or
      its scale grows, steadily and by more than learning makes them grow
      (:func:`~stabmon.rules.evidence.norm_growth.sustained_growth`), and a head's score has grown
      with them. Attributed to the layer, to no head.

    A loss that clearly falls over the same span is evidence of learning: growth must then be a
    quarter more. Growth without lost entropy, or a line that meets ``damage_level`` within
    ``horizon`` readings, is a warning with a forecast.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step in range(1, 8):
        ...     values = (90.0, 0.2) if step == 7 else (12.0, 0.7)
        ...     signals = zip(("max_logit", "normalized_entropy"), values)
        ...     history.add(Reading(step, None, {"attn": {k: np.array([v]) for k, v in signals}}))
        >>> LogitGrowth().check(history)
        [StabilityIssue(error logit_growth, attn head 0, step 7, value 90, threshold 48.48)]

    References:
        Wortsman et al. 2023, arXiv:2309.14322, and Dehghani et al. 2023, arXiv:2302.05442, on
        attention
        logits that grow until training diverges; Kimi K2, arXiv:2507.20534, on QK-clip.
    """

    symptom: ClassVar[Symptom] = SCORES
    value_of: ClassVar[str] = "max_logit"
    quantity: ClassVar[str] = "largest score"
    reads: ClassVar[tuple[str, ...]] = ("query_key",)
    cause_rank: ClassVar[int] = 10

    jump: Positive = 4.0
    """Growth of a score within one step, as a multiple of its own past.

    ``jump`` again for each 100 steps in between, up to three times ``jump``.
    """
    runaway: Positive = 8.0
    """Growth of a score within few steps, as a multiple of its own past.

    Twice as much over ``runaway_steps``.
    """
    runaway_steps: Count = 300
    """Number of steps; longer growth is slow sharpening.

    A score that grew 16-fold over them doubled in no less than 75.
    """
    damage_level: Positive = 1_000.0
    """Score of damage to training in published runs; all above 1e4 diverged.

    Wortsman et al. 2023, Kimi K2.
    """
    horizon: Count = 20
    """Readings ahead within which a forecast is a warning."""
    driven: Positive = 1.5
    """Growth of the gain of a layer's scores, as a multiple of its own past.

    The gain is the scale times the squared norm of W_q and W_k.
    """
    coherence: Fraction = 0.75
    """Least share of what its weights moved to go into their norm, in [0, 1]."""
    hysteresis: Fraction = 0.6
    """Closing level, as a share of the opening level."""

    @classmethod
    def symptom_of(cls, issue: StabilityIssue) -> Symptom:
        """Return sustained growth for an issue of a layer, scores for one of a head."""
        return SUSTAINED_GROWTH if issue.head is None else SCORES

    @classmethod
    def is_judged_by_risk(cls, issue: StabilityIssue) -> bool:
        """Return True for an issue of a head; sustained growth of a layer is proof by itself."""
        return issue.head is not None

    @classmethod
    def is_recovering(cls, issue: StabilityIssue, history: History) -> bool:
        """Return True if the head's largest score is below its threshold again."""
        return issue.head is not None and fell_below(issue, history, "max_logit")

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the growth of the scores beside their past in words."""
        worst, evidence = issues[0], issues[0].evidence
        numbers = f"largest score {number(worst.value)}{past(evidence)}"
        code = guard(framework) if worst.is_alarm else ""
        if worst.head is not None:
            numbers += growth(evidence)
            title = _TITLES.get(str(evidence.get("how")), "attention scores grow")
            return Description(title, numbers, worst.suggestion, code)
        times, since = known(evidence, "gain_times"), evidence.get("since_step")
        of_scale = evidence.get("by") == "scale"
        factor = "the scale of scores" if of_scale else "the scale of scores by W_q and W_k"
        if times is not None and since is not None:
            numbers = f"{factor} grew {number(times)} times since step {since}; {numbers}"
        title = (
            "the scale of attention scores grows, and not by learning"
            if of_scale
            else "W_q and W_k grow, and not by learning"
        )
        return Description(title, numbers + growth(evidence), worst.suggestion, code)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        signals = ("max_logit", "normalized_entropy", "saturated_fraction")
        return LooksBack(dict.fromkeys(signals, EVERY_READING), frozenset({"max_logit"}))

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head, and one for each layer of sustained growth.

        ``value`` is the largest score, ``threshold`` the score at which it is anomalous by its own
        past.
        """
        score, heads = history.now("max_logit"), len(history.heads)
        if heads == 0 or len(history) < 2:
            return []
        forecast = forecast_score(history, self.damage_level, least=LEAST_SCORE)
        found = HeadFindings.nothing(heads)
        for change in changes(history, least_ratio=self.jump):
            self._judge(history, change, forecast, score, found)
        self._judge_damage(history, score, found)
        warns = forecast.warns(self.horizon * _interval(history))
        found.add(warns, 0, self.damage_level, "forecast")
        level = history.open_level("logit_growth")
        found.add(score >= self.hysteresis * level, 0, level, "still")
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
        self,
        history: History,
        change: Change,
        forecast: Forecast,
        score: np.ndarray,
        found: HeadFindings,
    ) -> None:
        """Find jumps at one or two readings back, runaways at more."""
        if change.is_jump:
            needed = jump_needed(history, change.steps, self.jump)
            lost = (change.kept <= 0.5) | (change.saturated_rise >= 0.25)
            grown, how = change.ratio >= needed, "jump"
        else:
            patience = 1.25 if loss_fell(history, change.steps) else 1.0
            needed = patience * self.runaway * (1 + change.steps / self.runaway_steps)
            lost = (change.kept <= 0.35) & ~(change.saturated_rise < 0.1)
            rises = (forecast.eta <= change.steps) | (score >= self.damage_level)
            grown = (change.ratio >= needed) & (change.steps <= self.runaway_steps) & rises
            how = "runaway"
        level = needed * change.past_logit
        found.add(grown & lost, 1, level, how, change.ratio, change.kept)
        found.add(grown & ~lost, 0, level, how, change.ratio, change.kept)

    def _judge_damage(self, history: History, score: np.ndarray, found: HeadFindings) -> None:
        """Find heads that reached the level of known damage in this run."""
        rows = history.rows("max_logit", slice(-PAST_READINGS - 1, -1))
        past = np.maximum(largest(rows), SCORE_FLOOR)
        start = np.maximum(history.baseline("max_logit"), SCORE_FLOOR)
        # it still doubles, or it was not like this at first
        came = (score >= 2 * past) | (score >= self.runaway * start)
        spent = history.now("normalized_entropy") < 0.1
        damaged = (score >= self.damage_level) & spent & came
        found.add(damaged, 1, self.damage_level, "harm", score / np.fmin(past, start))

    def _of_layer(self, history: History, layer: str, forecast: Forecast) -> StabilityIssue | None:
        """Return the issue of a layer with sustained growth; None where it has none."""
        found = sustained_growth(history, layer, grown=self.driven, coherence=self.coherence)
        if found is None:
            return None
        heads = history.of_layer(layer)
        before = int(np.flatnonzero(history.steps <= found.since)[-1])
        rows = slice(max(0, before - PAST_READINGS + 1), before + 1)
        past = largest(history.rows("max_logit", rows, heads))
        score = history.now("max_logit")[heads]
        level = (WITH_SCALE if found.of_scale else WITH_WEIGHTS) * np.maximum(past, SCORE_FLOOR / 2)
        grown = (score >= level) & (score >= SCORE_FLOOR)
        if not grown.any():
            return None
        head = int(np.nanargmax(np.where(grown, score, np.nan)))
        eta, slope = float(forecast.eta[heads][head]), float(forecast.slope[heads][head])
        grows, hold = (
            ("the scale of its scores grows", "the scale (cap_scale)")
            if found.of_scale
            else ("its W_q and W_k grow along themselves", "their norm (cap_query_key_norm)")
        )
        usual = (
            f"Something other than learning drives this layer: {grows}. Look for what multiplies "
            "them (weight decay of the wrong sign, a rate or a penalty of one parameter group, a "
            f"scale that is written to); until then hold {hold}, or clip its heads (qk_clip)."
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
            | context_of(history, layer, slope),
            eta_steps=eta if np.isfinite(eta) else None,
        )

    def _issue(
        self, history: History, n: int, found: HeadFindings, forecast: Forecast
    ) -> StabilityIssue:
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
        } | context_of(history, layer, float(forecast.slope[n]))
        eta = float(forecast.eta[n])
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="logit_growth",
            severity=severity,
            value=float(history.now("max_logit")[n]),
            threshold=float(found.level[n]),
            suggestion=advice(history, layer, CLIP),
            evidence=evidence,
            eta_steps=eta if np.isfinite(eta) else None,
        )


_TITLES = {
    "jump": "attention scores jumped",
    "runaway": "attention scores run away",
    "harm": "attention scores reached the level of known damage",
    "forecast": "attention scores are on their way to damage",
}
"""Titles by how the growth of a head was found."""


def _interval(history: History) -> float:
    """Return the median number of optimizer steps between readings."""
    return float(np.median(np.diff(history.steps[-20:])))
