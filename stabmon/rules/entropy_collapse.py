"""A head suddenly attends to single keys where it used to spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from stabmon._settings import Bounds, Count, Fraction, NonNegative, Positive, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.baselines import SCORE_FLOOR, Change, changes, jump_needed
from stabmon.rules.evidence.context import advice, circumstances
from stabmon.rules.evidence.recovery import rose_above
from stabmon.rules.evidence.robust_stats import robust_spread
from stabmon.rules.symptoms import SCORES, Symptom
from stabmon.rules.tracking.history import History

START_READINGS = 32
"""Readings within which a model may count as fresh, if its loss falls fast."""
SINK = 0.3
"""Mean mass on the first key that tells a sink (Gu et al. 2024, arXiv:2410.10781)."""
FROM_THE_START = (
    "All heads are saturated from the start: make the initialisation of W_q and W_k smaller (a "
    "standard deviation of 0.02, or Xavier's), "
    "see that scores are scaled by 1/sqrt(head_dim), or bring the scores down now (QK-clip)."
)


@rule
@renamed(least_past="min_past_entropy", still_ill="hysteresis")
@dataclass(frozen=True)
class EntropyCollapse(Rule):
    """A head that suddenly lost the spread it used to have.

    Low entropy is no disease: local heads, sinks, copying and retrieval heads are nearly one-hot
        and right, and they get there while
    the loss falls, over tens of steps. The head's own past is the measure, and a fall counts as
    collapse only when it is faster than
    learning: within two readings the head keeps less than ``kept`` of its spread, and its scores
        jumped at the same time, or, where its
    scores are all small or negative and so tell nothing, nearly all of its rows saturated at once.
    The same fall without either witness, or a slow fall to ``floor``, is a warning.

    Heads that start without spread (below ``min_past_entropy``) have none to lose and are not
    judged so. But where nearly all heads of a model have little spread from the first reading on, with large
    scores all of one size and no sinks, and the loss falls as fast as it does in a fresh model
    only, nothing has been learned that could call for it: the initialisation is too large, and that
    is an alarm.
    """

    symptom: ClassVar[Symptom] = SCORES

    kept: Fraction = 0.4
    """Share of its own past entropy that a collapsed head keeps at most."""
    jump: Positive = 4.0
    """Times its own past that the largest score must have jumped within one step; plus the same for
    each 100 steps in between.
    """
    saturates: Fraction = 0.6
    """Share of rows that must have lost their gradient at once where the score gives no witness."""
    sudden_steps: Count = 20
    """Steps within which that must happen to be sudden; learners were seen to saturate half their
    rows in 75.
    """
    floor: Fraction = 0.02
    """Normalised entropy, in [0, 1], below which even a slow fall is worth a look."""
    min_past_entropy: Fraction = 0.1
    """Normalised entropy that a head must have had to be judged."""
    start: Fraction = 0.4
    """Normalised entropy below which a head lacks spread in the first readings, where its largest
    score is also above ``start_score``.
    """
    start_score: NonNegative = 15.0
    """Scores of a fresh model are a few at most."""
    start_heads: Fraction = 0.9
    """Share of all heads that must be so."""
    start_alike: NonNegative = 0.35
    """Robust spread of the logarithm of the heads' largest scores above which they have learned to
    differ.
    """
    start_fall: Fraction = 0.1
    """Share of the first loss that must have been lost: what has been trained before has little
    left to lose.
    """
    hysteresis: Annotated[float, Bounds(above=0, high=1)] = 0.6
    """An open issue stays open until the entropy is above its opening level divided by this."""

    @classmethod
    def is_recovering(cls, issue: StabilityIssue, history: History) -> bool:
        return rose_above(issue, history, "normalized_entropy", share=0.5)

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a head; ``value`` is its normalised entropy, ``threshold`` the entropy at which
        it is called collapsed.
        """
        entropy = history.now("normalized_entropy")
        rank, level = np.full(len(entropy), -1), np.full(len(entropy), np.nan)
        ratio, past = level.copy(), level.copy()
        for change in changes(history, lags=(1, 2)):
            fell = (change.past_entropy >= self.min_past_entropy) & (change.kept <= self.kept)
            error = fell & self._witnessed(history, change)
            for found, value in ((error, 1), (fell & (change.steps <= self.sudden_steps), 0)):
                new = found & (rank < value)
                rank[new], level[new] = value, (self.kept * change.past_entropy)[new]
                ratio[new], past[new] = change.ratio[new], change.past_entropy[new]
        fresh = (rank < 1) & self._saturated_from_the_start(history)
        rank[fresh], level[fresh] = 1, self.start
        start, open_level = (
            history.baseline("normalized_entropy"),
            history.open_level("entropy_collapse"),
        )
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
        """``[N]`` bool: scores jumped; or nearly all rows saturated at once though no score is
        large, as where all others fell.
        """
        jumped = change.ratio >= jump_needed(history, change.steps, self.jump)
        silent = history.now("max_logit") < SCORE_FLOOR
        saturated = (
            silent & (change.saturated_rise >= self.saturates) & (change.steps <= self.sudden_steps)
        )
        witnessed: np.ndarray = jumped | saturated
        return witnessed

    def _saturated_from_the_start(self, history: History) -> np.ndarray:
        """``[N]`` bool: the head is saturated in the first readings of a fresh model in which
        nearly all are, and alike.
        """
        nobody = np.zeros(len(history.heads), dtype=bool)
        losses = history.recent_losses[:, 1]
        if (
            len(history) > START_READINGS
            or len(losses) < 2
            or np.median(losses[-3:]) > (1 - self.start_fall) * losses[0]
        ):
            return nobody
        saturated, known = ~nobody, ~nobody
        for at in (0, -1):
            entropy, score = (
                history.signal("normalized_entropy")[at],
                history.signal("max_logit")[at],
            )
            saturated &= (entropy <= self.start) & (score >= self.start_score) & np.isfinite(score)
            known &= np.isfinite(entropy) & np.isfinite(score)
        if saturated.sum() < max(2, self.start_heads * known.sum()):
            return nobody
        alike = (
            robust_spread(np.log(history.signal("max_logit")[0][saturated])[:, None])[0]
            <= self.start_alike
        )
        sinks = np.median(np.nan_to_num(history.now("sink_mass")[saturated])) > SINK
        return saturated & bool(alike and not sinks)

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
                "scores before the fall): saturated "
                "rows pass almost no gradient, so neither a lower rate, dropout nor an entropy "
                "penalty brings the spread back.",
            ),
            evidence={
                "past_entropy": past,
                "score_times_own_past": ratio,
                "max_logit": float(history.now("max_logit")[n]),
                "saturated_fraction": float(history.now("saturated_fraction")[n]),
                "from_the_start": fresh,
            }
            | circumstances(history, layer),
        )
