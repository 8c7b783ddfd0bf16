"""What one step changes of the weights jumped far beyond anything before: with the learning rate, or in one layer's queries and keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stabmon.records import Reading, StabilityIssue
from stabmon.rules.base import rule
from stabmon.rules.history import History

PAST = 22
"""Newest readings that are looked at: the median of all but two is what a step used to change."""

FIRST = 8
"""Readings that show whether the rate was too high from the start."""


@rule
@dataclass(frozen=True)
class UpdateSpike:
    """W_q and W_k move by a large share of themselves in one step, far beyond what they did before.

    - The rate rose manifold over the largest that the run had seen: a slip in a schedule shows here at the first sampled step, before
      scores and loss tell of it. A warm-up rises by little from reading to reading, and a warm restart comes back to a rate that was there
      before: both give nothing. Blames no layer: every weight is moved too far.
    - The rate did not, and yet a layer's queries and keys are moved ``layer_jump`` times as far as before in two readings one after the
      other, as where the rate of a parameter group is wrong. Weights that became smaller, and are moved as ever, are no sign of it.
      Blames the layer. One gradient that bursts moves Adam's step by less
      (0.1 / sqrt(1 - beta2) of its usual size, 3.2 times at 0.999), and neither it nor a single jump of the weights comes twice.
    - From the first readings on two in a row moved them by more than any healthy run's, and heads have broken since: the rate was too high
      from the start. The rate that fits is told, at which a step would have changed ``fitting`` of them. Blames no layer.
    """

    rate_jump: float = 4.0
    """Times the largest rate so far."""
    update: float = 0.08
    """Share of W_q and W_k that one step must change; healthy runs were seen to change up to 0.05 once they are warm."""
    update_jump: float = 3.0
    """Times the median of that share over the newest readings before."""
    layer_jump: float = 6.0
    """Times the layer's own past that its share must be where the rate did not jump."""
    fitting: float = 0.025
    """Share that the first readings of healthy runs come to."""
    least_past: int = 4
    """Readings that must be known before any is judged."""
    still_ill: float = 0.6
    """Share of the opening levels above which an open issue stays open."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue for the run, of which ``value`` and ``threshold`` are the rate and the rate at which it is too high; else one a layer,
        of which they are the share of W_q and W_k that the step changed and the share at which it is too large."""
        found = self._of_rate(history) or self._from_the_start(history)
        return found or [issue for layer in history.latest.query_key for issue in self._of_layer(history, layer)]

    def _from_the_start(self, history: History) -> list[StabilityIssue]:
        first = history.readings[:FIRST]
        shares = np.array([_share_moved(reading) for reading in first])
        rates = [reading.learning_rate for reading in first]
        twice = np.fmin(shares[1:], shares[:-1])
        broken = any(history.is_open(kind).any() for kind in ("logit_growth", "entropy_collapse"))
        moved, now = _share_moved(history.latest), history.latest.learning_rate
        if not broken or len(history) >= history.length or not (twice >= self.update).any() or now is None:
            return []
        worst = int(np.nanargmax(shares))
        fitting = float((rates[worst] or now) * self.fitting / shares[worst])
        if not (moved >= self.still_ill * self.update and now > fitting):
            return []
        return [
            _issue(
                history,
                None,
                now,
                fitting,
                suggestion=(
                    f"The rate is too high from the start: a step changed {shares[worst]:.0%} of W_q and W_k. Start again with a peak rate "
                    f"of {fitting:.2g} or a longer warm-up, or cap it there now (cap_learning_rate)."
                ),
                evidence={"fitting_rate": fitting, "query_key_update": moved, "largest_query_key_update": float(shares[worst])},
            )
        ]

    def _of_layer(self, history: History, layer: str) -> list[StabilityIssue]:
        readings = [reading for reading in history.readings[-PAST:] if layer in reading.query_key]
        shares = np.array([reading.query_key[layer].share for reading in readings])
        updates = np.array([reading.query_key[layer].update for reading in readings])
        if len(shares) < self.least_past + 2 or not np.isfinite(shares[-1]):
            return []
        usual, level = float(np.nanmedian(shares[:-2])), history.open_level_at("update_spike", layer)
        shares = shares[-2:] * (updates[-2:] >= 0.5 * self.layer_jump * np.nanmedian(updates[:-2]))
        is_open = np.isfinite(level)
        if not is_open:
            level = max(self.update, self.layer_jump * usual)
        if not (shares[-1] >= self.still_ill * level if is_open else (shares >= level).all()):
            return []
        return [
            _issue(
                history,
                layer,
                float(shares[-1]),
                float(level),
                suggestion=(
                    f"Look at the rate of the parameter group of this layer's queries and keys: a step changes {shares[-1]:.0%} of them, "
                    f"and the rate did not jump. Cap what a step changes of them (cap_query_key_update)."
                ),
                evidence={"query_key_update": float(shares[-1]), "usual_query_key_update": usual},
            )
        ]

    def _of_rate(self, history: History) -> list[StabilityIssue]:
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
            _issue(
                history,
                None,
                now,
                self.rate_jump * highest,
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


def _issue(
    history: History, layer: str | None, value: float, threshold: float, *, suggestion: str, evidence: dict[str, float]
) -> StabilityIssue:
    return StabilityIssue(
        history.latest.step, layer, None, "update_spike", "error", value, threshold, suggestion=suggestion, evidence=evidence
    )


def _share_moved(reading: Reading) -> float:
    """The median over layers, NaN where unknown."""
    shares = [moved.share for moved in reading.query_key.values() if np.isfinite(moved.share)]
    return float(np.median(shares)) if shares else float("nan")
