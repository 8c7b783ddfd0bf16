"""The loss left its own recent course upwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from stabmon._settings import Bounds, Count, NonNegative, Positive, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.robust_stats import robust_spread
from stabmon.rules.symptoms import LOSS, Symptom
from stabmon.rules.tracking.history import History


@rule
@renamed(
    stays_deviations="persistence_deviations",
    least_rise="min_rise",
    stays="persistence",
    far="extreme_rise",
    least_past="min_history",
)
@dataclass(frozen=True)
class LossSpike(Rule):
    """The loss jumped above what its own recent noise explains; an alarm only where it stays up
    there.

    Each loss since the last reading is held against the median of the ``near`` losses before it, in
    units of their noise: the spread of the differences between neighbours, which a falling loss
    does not widen. A single high loss is a hard batch, and a loss that jumps and then steadily
    comes down is new data being learned: warnings. An alarm is a loss of which the newest
    ``persistence`` values are all well above and no longer come down, as after too large a step or
    where data has turned to noise; or which are all so far above, by ``extreme_rise``, that no new
    data explains it; or any spike while steps are too large (``update_spike``), which no hard batch explains. Blames no head: a
    bad batch, a rate too high and broken attention look alike here.
    """

    symptom: ClassVar[Symptom] = LOSS

    deviations: Positive = 8.0
    """Spreads above the recent median from which a loss counts as a spike; noise of heavy tails
    reaches 5.
    """
    persistence_deviations: NonNegative = 5.0
    """The same for each of the losses that stay up: all of them that far is stranger than one at
    ``deviations``.
    """
    min_rise: NonNegative = 0.1
    """Share of the recent median by which the loss must also have risen, for runs whose loss hardly
    moves.
    """
    persistence: Annotated[int, Bounds(2)] = 24
    """Newest losses that must all be beyond the level for an alarm."""
    extreme_rise: NonNegative = 0.75
    """Share of the recent median by which all of the newest losses must lie above it for an alarm
    though they come down.
    """
    recovering: Positive = 0.85
    """An excess over the recent median whose newer half is below this share of its older half is
    coming down: no alarm.
    """
    past: Count = 100
    """Losses from which the noise is taken."""
    near: Count = 32
    """Losses that make up the recent course: fewer, since it may be falling."""
    min_history: Count = 24
    """Losses that must be known before any is judged."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """At most one issue, for the run. NaN and inf are left to ``non_finite``."""
        reading = history.latest
        new = max(1, len(reading.losses))
        known = history.recent_losses[-self.past - new - self.persistence :]
        steps, losses = known[:, 0], known[:, 1]
        tail = (
            new + self.persistence
        )  # the past must end before any spike that may have begun within an earlier reading
        if len(losses) < self.min_history + tail:
            return []
        past, newest = losses[-self.past - tail : -tail], losses[-tail:]
        near = past[-self.near :]
        middle, spread = (
            float(np.median(near)),
            float(robust_spread(np.diff(past)[:, None])[0]) / 2**0.5,
        )
        level = middle + max(
            self.deviations * spread,
            self.min_rise * abs(middle),
            3 * spread + np.quantile(near, 0.95) - middle,
        )
        highest = int(np.argmax(newest[-new:])) + tail - new
        if newest[highest] <= level and not (
            history.is_open_at("loss_spike") and np.median(newest[-self.persistence :]) > level
        ):
            return []
        older, newer = np.split(newest[-2 * (self.persistence // 2) :] - middle, 2)
        coming_down = np.median(newer) < self.recovering * np.median(older)
        far = newest[-self.persistence :].min() > middle + self.extreme_rise * abs(middle)
        stays_level = middle + self.persistence_deviations / self.deviations * (level - middle)
        staying = bool(
            (newest[-self.persistence :] > stays_level).all() and (far or not coming_down)
        )
        torn = newest[highest] > level and history.is_open_at("update_spike")
        evidence = {
            "spike_step": int(steps[-tail:][highest]),
            "recent_median": middle,
            "recent_spread": spread,
            "deviations": float((newest[highest] - middle) / max(spread, 1e-12)),
            "stays": staying,
            "update_spike": bool(torn),
        }
        return [
            StabilityIssue(
                step=reading.step,
                layer=None,
                head=None,
                issue_type="loss_spike",
                severity="error" if staying or torn else "warning",
                value=float(newest[highest]),
                threshold=float(level),
                suggestion=STAYS if staying or torn else PASSING,
                evidence=evidence,
            )
        ]


STAYS = (
    "Go back to a checkpoint before the spike and skip the batches around it, then lower the rate "
    "or clip gradients; see whether "
    "an attention issue opened before it, which names what to mend."
)
PASSING = (
    "One hard batch passes by itself: look at that batch; if spikes come back, clip "
    "gradients or lengthen the warm-up."
)
