"""The loss left its own recent course upwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.robust_stats import robust_spread
from stabmon.rules.symptoms import LOSS, Symptom
from stabmon.rules.tracking.history import History


@rule
@dataclass(frozen=True)
class LossSpike(Rule):
    """The loss jumped above what its own recent noise explains; an alarm only where it stays up
    there.

    Each loss since the last reading is held against the median of the ``near`` losses before it, in
    units of their noise: the spread of the differences between neighbours, which a falling loss
    does not widen. A single high loss is a hard batch, and a loss that jumps and then steadily
    comes down is new data being learned: warnings. An alarm is a loss of which the newest ``stays``
    values are all well above and no longer come down, as after too large a step or where data has
    turned to noise; or which are all that ``far`` away that no new data explains it; or any spike
    while steps are too large (``update_spike``), which no hard batch explains. Blames no head: a
    bad batch, a rate too high and broken attention look alike here.
    """

    symptom: ClassVar[Symptom] = LOSS

    deviations: float = 8.0
    """Spreads above the recent median from which a loss counts as a spike; noise of heavy tails
    reaches 5.
    """
    stays_deviations: float = 5.0
    """The same for each of the losses that stay up: all of them that far is stranger than one at
    ``deviations``.
    """
    least_rise: float = 0.1
    """Share of the recent median by which the loss must also have risen, for runs whose loss hardly
    moves.
    """
    stays: int = 24
    """Newest losses that must all be beyond the level for an alarm."""
    far: float = 0.75
    """Share of the recent median by which all of the newest losses must lie above it for an alarm
    though they come down.
    """
    recovering: float = 0.85
    """An excess over the recent median whose newer half is below this share of its older half is
    coming down: no alarm.
    """
    past: int = 100
    """Losses from which the noise is taken."""
    near: int = 32
    """Losses that make up the recent course: fewer, since it may be falling."""
    least_past: int = 24
    """Losses that must be known before any is judged."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """At most one issue, for the run. NaN and inf are left to ``non_finite``."""
        reading = history.latest
        new = max(1, len(reading.losses))
        known = history.recent_losses[-self.past - new - self.stays :]
        steps, losses = known[:, 0], known[:, 1]
        tail = (
            new + self.stays
        )  # the past must end before any spike that may have begun within an earlier reading
        if len(losses) < self.least_past + tail:
            return []
        past, newest = losses[-self.past - tail : -tail], losses[-tail:]
        near = past[-self.near :]
        middle, spread = (
            float(np.median(near)),
            float(robust_spread(np.diff(past)[:, None])[0]) / 2**0.5,
        )
        level = middle + max(
            self.deviations * spread,
            self.least_rise * abs(middle),
            3 * spread + np.quantile(near, 0.95) - middle,
        )
        highest = int(np.argmax(newest[-new:])) + tail - new
        if newest[highest] <= level and not (
            history.is_open_at("loss_spike") and np.median(newest[-self.stays :]) > level
        ):
            return []
        older, newer = np.split(newest[-2 * (self.stays // 2) :] - middle, 2)
        coming_down = np.median(newer) < self.recovering * np.median(older)
        far = newest[-self.stays :].min() > middle + self.far * abs(middle)
        stays_level = middle + self.stays_deviations / self.deviations * (level - middle)
        staying = bool((newest[-self.stays :] > stays_level).all() and (far or not coming_down))
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
