"""A head suddenly attends to single keys where it used to spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stabmon.records import StabilityIssue
from stabmon.rules.base import rule
from stabmon.rules.circumstances import circumstances
from stabmon.rules.history import History
from stabmon.rules.own_past import Change, changes, jump_needed


@rule
@dataclass(frozen=True)
class EntropyCollapse:
    """A head that suddenly lost the spread it used to have.

    Low entropy is no disease: local heads, sinks, copying and retrieval heads are nearly one-hot and right, and they get there while
    the loss falls, over tens of steps. The head's own past is the measure, and a fall counts as collapse only when it is faster than
    learning: within two readings the head keeps less than ``kept`` of its spread, and its scores jumped at the same time, or
    nearly all of its rows saturated at once. The same fall without either witness, or a slow fall to ``floor``, is a warning.
    Heads that start without spread (below ``least_past``) have none to lose and are never judged.
    """

    kept: float = 0.4
    """Share of its own past entropy that a collapsed head keeps at most."""
    jump: float = 4.0
    """Times its own past that the largest score must have jumped within one step; plus the same for each 100 steps in between."""
    saturates: float = 0.6
    """Share of rows that must have lost their gradient at once where the score gives no witness."""
    sudden_steps: int = 20
    """Steps within which that must happen to be sudden; learners were seen to saturate half their rows in 75."""
    floor: float = 0.02
    """Normalised entropy, in [0, 1], below which even a slow fall is worth a look."""
    least_past: float = 0.1
    """Normalised entropy that a head must have had to be judged."""
    still_ill: float = 0.6
    """An open issue stays open until the entropy is above its opening level divided by this."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue a head; ``value`` is its normalised entropy, ``threshold`` the entropy at which it is called collapsed."""
        entropy = history.now("normalized_entropy")
        rank, level = np.full(len(entropy), -1), np.full(len(entropy), np.nan)
        ratio, past = level.copy(), level.copy()
        for change in changes(history, lags=(1, 2)):
            fell = (change.past_entropy >= self.least_past) & (change.kept <= self.kept)
            error = fell & self._witnessed(history, change)
            for found, value in ((error, 1), (fell & (change.steps <= self.sudden_steps), 0)):
                new = found & (rank < value)
                rank[new], level[new] = value, (self.kept * change.past_entropy)[new]
                ratio[new], past[new] = change.ratio[new], change.past_entropy[new]
        start, open_level = history.baseline("normalized_entropy"), history.open_level("entropy_collapse")
        slow = (rank < 0) & (start >= self.least_past) & (entropy < np.minimum(self.floor, 0.2 * start))
        rank[slow], level[slow], past[slow] = 0, self.floor, start[slow]
        still = (rank < 0) & (entropy <= open_level / self.still_ill)
        rank[still], level[still] = 0, open_level[still]
        return [
            self._issue(history, n, bool(rank[n] == 1), float(level[n]), float(past[n]), float(ratio[n]))
            for n in np.flatnonzero(rank >= 0).tolist()
        ]

    def _witnessed(self, history: History, change: Change) -> np.ndarray:
        """``[N]`` bool: scores jumped, or nearly all rows saturated at once."""
        jumped = change.ratio >= jump_needed(history, change.steps, self.jump)
        saturated = (change.saturated_rise >= self.saturates) & (change.steps <= self.sudden_steps)
        witnessed: np.ndarray = jumped | saturated
        return witnessed

    def _issue(self, history: History, n: int, error: bool, level: float, past: float, ratio: float) -> StabilityIssue:
        layer, head = history.heads[n]
        return StabilityIssue(
            step=history.latest.step,
            layer=layer,
            head=head,
            issue_type="entropy_collapse",
            severity="error" if error else "warning",
            value=float(history.now("normalized_entropy")[n]),
            threshold=level,
            suggestion=(
                "Bring the head's scores back to what they were (QK-clip on this head, to its own scores before the fall): saturated "
                "rows pass almost no gradient, so neither a lower rate, dropout nor an entropy penalty brings the spread back."
            ),
            evidence={
                "past_entropy": past,
                "score_times_own_past": ratio,
                "max_logit": float(history.now("max_logit")[n]),
                "saturated_fraction": float(history.now("saturated_fraction")[n]),
            }
            | circumstances(history, layer),
        )
