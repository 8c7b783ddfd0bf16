"""Collapse of attention entropy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from stabmon._settings import Bounds, Count, Fraction, NonNegative, Positive, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.baselines import SCORE_FLOOR, Change, changes, jump_needed
from stabmon.rules.evidence.context import advice, context_of
from stabmon.rules.evidence.recovery import rose_above
from stabmon.rules.evidence.robust_stats import robust_spread
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import EVERY_READING, LooksBack
from stabmon.rules.wording.code_lines import guard
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, number, past

SINK = 0.3
"""Mean mass on the first key from which a head is a sink.

Gu et al. 2024, arXiv:2410.10781.
"""
FROM_THE_START = (
    "All heads are saturated from the start: make the initialisation of W_q and W_k smaller (a "
    "standard deviation of 0.02, or Xavier's), check that scores are scaled by 1/sqrt(head_dim), "
    "or bring the scores down now (QK-clip)."
)


@rule
@renamed(least_past="min_past_entropy", still_ill="hysteresis")
@dataclass(frozen=True)
class EntropyCollapse(Rule):
    r"""Sudden loss of a head's attention entropy.

    Low entropy is no failure by itself: local heads, sinks, copying and retrieval heads are nearly
    one-hot and right, and they get there while the loss falls, over tens of steps. So the head's
    own past is the measure, and a fall is an alarm only when it is faster than learning. With h the
    normalised entropy, :math:`h = H / \ln n`, and its median over five earlier readings:

    - :math:`h_{now} \le kept \cdot h_{past}` within two readings, and at the same time the largest
      score jumped (``jump``), or, where all scores are small or negative and give no evidence,
      nearly all rows saturated at once (``saturates``);
    - the same fall with neither, or a slow fall below ``floor``, is a warning.

    Heads that start with little entropy (below ``min_past_entropy``) have none to lose and are not
    judged so. But where nearly all heads of a model have little of it from the first reading on,
    with large scores all of one size and no sinks, and the loss falls as fast as it does in a fresh
    model only, nothing has been learned that could call for it: the initialisation is too large,
    and that is an alarm.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step in range(1, 8):
        ...     values = (80.0, 0.05) if step == 7 else (4.0, 0.7)
        ...     signals = zip(("max_logit", "normalized_entropy"), values)
        ...     history.add(Reading(step, None, {"attn": {k: np.array([v]) for k, v in signals}}))
        >>> EntropyCollapse().check(history)
        [StabilityIssue(error entropy_collapse, attn head 0, step 7, value 0.05, threshold 0.28)]

    References:
        Zhai et al. 2023, arXiv:2303.06296, on entropy collapse.
    """

    symptom: ClassVar[Symptom] = SCORES
    value_of: ClassVar[str] = "normalized_entropy"
    cause_rank: ClassVar[int] = 30

    kept: Fraction = 0.4
    """Largest share of its own past entropy that a collapsed head keeps."""
    jump: Positive = 4.0
    """Growth of the largest score within one step, as a multiple of its own past.

    Once more for each 100 steps in between.
    """
    saturates: Fraction = 0.6
    """Share of rows to saturate at once where scores give no evidence."""
    sudden_steps: Count = 20
    """Largest number of steps in between for the fall to be sudden.

    Learners were seen to saturate half their rows in 75.
    """
    floor: Fraction = 0.02
    """Normalised entropy, in [0, 1]; even a slow fall below it is a warning."""
    min_past_entropy: Fraction = 0.1
    """Least normalised entropy in the past for a head to be judged, in [0, 1]."""
    start: Fraction = 0.4
    """Normalised entropy; below it a head is saturated in the first readings.

    Its largest score must also be above ``start_score``.
    """
    start_score: NonNegative = 15.0
    """Largest score of a saturated head in a fresh model, at least; a few is normal."""
    start_heads: Fraction = 0.9
    """Share of all heads to be saturated in the first readings."""
    start_alike: NonNegative = 0.35
    """Largest robust standard deviation of ln max-score over these heads.

    Heads that have learned differ from each other by more.
    """
    start_fall: Fraction = 0.1
    """Share of the first loss by which the loss must have fallen.

    A model that has been trained before has little left to gain.
    """
    hysteresis: Annotated[float, Bounds(above=0, high=1)] = 0.6
    """Share by which the opening level is divided to give the closing level."""

    @classmethod
    def is_judged_by_risk(cls, issue: StabilityIssue) -> bool:
        """Return True for every issue."""
        return True

    @classmethod
    def is_recovering(cls, issue: StabilityIssue, history: History) -> bool:
        """Return True if the head's entropy is above half its threshold again."""
        return rose_above(issue, history, "normalized_entropy", share=0.5)

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the entropy beside its past in words."""
        worst = issues[0]
        numbers = f"normalized entropy {number(worst.value)}{past(worst.evidence)}"
        score = known(worst.evidence, "max_logit")
        numbers += "" if score is None else f"; largest score {number(score)}"
        ratio = known(worst.evidence, "score_times_own_past")
        numbers += f", {number(ratio)} times its past" if ratio is not None and ratio > 1.5 else ""
        fresh = bool(worst.evidence.get("from_the_start"))
        title = "attention is saturated from the start" if fresh else "attention entropy collapsed"
        return Description(title, numbers, worst.suggestion, guard(framework))

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        signals = ("max_logit", "normalized_entropy", "saturated_fraction")
        return LooksBack(dict.fromkeys(signals, EVERY_READING), frozenset({"normalized_entropy"}))

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for each head that lost its entropy.

        ``value`` is its normalised entropy, ``threshold`` the entropy at which it counts as
        collapsed.
        """
        entropy = history.now("normalized_entropy")
        rank, level = np.full(len(entropy), -1), np.full(len(entropy), np.nan)
        ratio, past = level.copy(), level.copy()
        for change in changes(history, jumps_only=True):
            fell = (change.past_entropy >= self.min_past_entropy) & (change.kept <= self.kept)
            error = fell & self._witnessed(history, change)
            for found, value in ((error, 1), (fell & (change.steps <= self.sudden_steps), 0)):
                new = found & (rank < value)
                rank[new], level[new] = value, (self.kept * change.past_entropy)[new]
                ratio[new], past[new] = change.ratio[new], change.past_entropy[new]
        fresh = (rank < 1) & self._saturated_from_the_start(history)
        rank[fresh], level[fresh] = 1, self.start
        start = history.baseline("normalized_entropy")
        open_level = history.open_level("entropy_collapse")
        slow = (
            (rank < 0)
            & (start >= self.min_past_entropy)
            & (entropy < np.minimum(self.floor, 0.2 * start))
        )
        rank[slow], level[slow], past[slow] = 0, self.floor, start[slow]
        still = (rank < 0) & (entropy <= open_level / self.hysteresis)
        rank[still], level[still] = 0, open_level[still]
        return [
            self._issue(
                history,
                n,
                bool(rank[n] == 1),
                float(level[n]),
                float(past[n]),
                float(ratio[n]),
                bool(fresh[n]),
            )
            for n in np.flatnonzero(rank >= 0).tolist()
        ]

    def _witnessed(self, history: History, change: Change) -> np.ndarray:
        """Return ``[N]`` bool: scores jumped, or nearly all rows saturated at once.

        The latter counts only where no score is large, as where all others fell.
        """
        jumped = change.ratio >= jump_needed(history, change.steps, self.jump)
        silent = history.now("max_logit") < SCORE_FLOOR
        saturated = (
            silent & (change.saturated_rise >= self.saturates) & (change.steps <= self.sudden_steps)
        )
        witnessed: np.ndarray = jumped | saturated
        return witnessed

    def _saturated_from_the_start(self, history: History) -> np.ndarray:
        """Return ``[N]`` bool: saturated in a fresh model in which nearly all heads are."""
        none = np.zeros(len(history.heads), dtype=bool)
        losses = history.recent_losses[:, 1]
        if len(losses) < 2 or np.median(losses[-3:]) > (1 - self.start_fall) * losses[0]:
            return none
        saturated, known = ~none, ~none
        at_start = none.copy()
        for layer in history.layers:
            at_start[history.of_layer(layer)] = history.is_at_start(layer)
        for at in (0, -1):
            row = slice(at, at + 1 or None)
            entropy, score = (
                history.rows(name, row)[0] for name in ("normalized_entropy", "max_logit")
            )
            saturated &= (entropy <= self.start) & (score >= self.start_score) & np.isfinite(score)
            known &= np.isfinite(entropy) & np.isfinite(score)
        if saturated.sum() < max(2, self.start_heads * known.sum()):
            return none
        alike = (
            robust_spread(np.log(history.rows("max_logit", slice(1), saturated)[0])[:, None])[0]
            <= self.start_alike
        )
        sinks = np.median(np.nan_to_num(history.now("sink_mass")[saturated])) > SINK
        fresh: np.ndarray = saturated & at_start & bool(alike and not sinks)
        return fresh

    def _issue(
        self,
        history: History,
        n: int,
        error: bool,
        level: float,
        past: float,
        ratio: float,
        fresh: bool,
    ) -> StabilityIssue:
        layer, head = history.heads[n]
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="entropy_collapse",
            severity="error" if error else "warning",
            value=float(history.now("normalized_entropy")[n]),
            threshold=level,
            suggestion=FROM_THE_START
            if fresh
            else advice(
                history,
                layer,
                "Bring the head's scores back to what they were (QK-clip on this head, to its own "
                "scores before the fall): saturated rows pass almost no gradient, so neither a "
                "lower rate, dropout nor an entropy penalty brings the entropy back.",
            ),
            evidence={
                "past_entropy": past,
                "score_times_own_past": ratio,
                "max_logit": float(history.now("max_logit")[n]),
                "saturated_fraction": float(history.now("saturated_fraction")[n]),
                "from_the_start": fresh,
            }
            | context_of(history, layer),
        )
