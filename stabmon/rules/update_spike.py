"""The learning rate, and with it what one step changes of the weights, jumped far beyond anything before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stabmon.records import Reading, StabilityIssue
from stabmon.rules.base import rule
from stabmon.rules.history import History


@rule
@dataclass(frozen=True)
class UpdateSpike:
    """The rate rose manifold over the largest that the run had seen, and W_q and W_k move by a large share of themselves in one step.

    A slip in a schedule or a parameter group shows here at the first sampled step, before scores and loss tell of it. A warm-up rises by
    little from reading to reading, and a warm restart comes back to a rate that was there before: both give nothing. Blames no
    head: every weight is moved too far.
    """

    rate_jump: float = 4.0
    """Times the largest rate so far."""
    update: float = 0.08
    """Share of W_q and W_k that one step must change; healthy runs were seen to change up to 0.05 once they are warm."""
    update_jump: float = 3.0
    """Times the median of that share over the newest readings before."""
    least_past: int = 4
    """Readings that must be known before any is judged."""
    still_ill: float = 0.6
    """Share of the opening levels above which an open issue stays open."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """At most one issue, for the run; ``value`` is the rate, ``threshold`` the rate at which it is called too high."""
        highest = self._highest_before(history.readings)
        now, moved = history.latest.learning_rate, _share_moved(history.latest)
        if highest is None or now is None:
            return []
        past = [share for share in map(_share_moved, history.readings[-21:-1]) if np.isfinite(share)]
        is_open = history.is_open_at("update_spike")
        usual = float(np.median(past)) if past else np.nan
        far = moved >= (self.still_ill * self.update if is_open else max(self.update, self.update_jump * usual))
        if not far:
            return []
        evidence = {"highest_rate_before": highest, "query_key_update": moved, "usual_query_key_update": usual}
        return [
            StabilityIssue(
                step=history.latest.step,
                layer=None,
                head=None,
                issue_type="update_spike",
                severity="error",
                value=now,
                threshold=self.rate_jump * highest,
                suggestion=(
                    f"Look at the schedule and the parameter groups: the rate is {now:.2g}, {now / highest:.0f} times the highest before. "
                    "Cap it, and go back to a checkpoint before this step."
                ),
                evidence=evidence,
            )
        ]

    def _highest_before(self, readings: list[Reading]) -> float | None:
        """The largest rate before the jump that the newest reading is still above; None where there is none such."""
        highest, jumped, known = 0.0, False, 0
        for reading in readings:
            rate = reading.learning_rate
            if rate is None:
                continue
            level = self.rate_jump * highest * (self.still_ill if jumped else 1.0)
            jumped = known >= self.least_past and 0 < level <= rate
            if not jumped:
                highest = max(highest, rate)
            known += 1
        return highest if jumped else None


def _share_moved(reading: Reading) -> float:
    """What the step changed of W_q and W_k, over their norm: the median over layers, NaN where unknown."""
    shares = [moved.update / moved.weight for moved in reading.query_key.values() if moved.weight > 0]
    return float(np.median(shares)) if shares else float("nan")
