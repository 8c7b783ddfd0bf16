"""Steps are too long: for every parameter group, for one of them, or in one layer's queries and
keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, Positive, renamed
from stabmon.records import Overshoot, Reading, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import RATE, STEP, Symptom
from stabmon.rules.tracking.history import History

PAST = 22
"""Newest readings that are looked at: the median of all but two is what a step used to change."""

FIRST = 8
"""Readings that show whether the rate was too high from the start."""

SLACK = 1.1
"""Times the fitting rate above which the rate used is still too high."""


@rule
@renamed(least_past="min_history", still_ill="hysteresis")
@dataclass(frozen=True)
class UpdateSpike(Rule):
    """A step changes more of the weights than they bear.

    - Steps were seen to gain far less on their own batch than the gradient foretold, or tore the
      loss up (:class:`~stabmon.records.Overshoot`): the rate is too high, whatever the weights are,
      from the first step on. The rate that fits is told, and stays told until what is used comes
      down to it. Blames no layer.
    - The rate of a parameter group rose manifold over the largest that the group had before, and
      its parameters move by a larger share of themselves than they did: a slip in a schedule or a
      group. A warm-up rises by little from reading to reading, and a warm restart comes back to a
      rate that was there before: both give nothing. Names the group.
    - No rate did, and yet a layer's queries and keys are moved ``layer_jump`` times as far as
      before in two readings one after the other. Weights that became smaller, and are moved as
      ever, are no sign of it. Blames the layer. One gradient that bursts moves Adam's step by less
      (0.1 / sqrt(1 - beta2) of its usual size, 3.2 times at 0.999), and neither it nor a single
      jump of the weights comes twice.
    - Where steps cannot be probed: from the first readings on two in a row moved W_q and W_k by
      more than any healthy run's, and heads have broken since. The rate that fits is told, at which
      a step would have changed ``fitting`` of them.
    """

    symptom: ClassVar[Symptom] = RATE
    explains_others: ClassVar[bool] = True

    rate_jump: Positive = 4.0
    """Times the largest rate so far."""
    update: Positive = 0.08
    """Share of W_q and W_k that one step must change; healthy runs were seen to change up to 0.05
    once they are warm.
    """
    update_jump: Positive = 3.0
    """Times the median share by which a group moved over the newest readings before."""
    layer_jump: Positive = 6.0
    """Times the layer's own past that its share must be where the rate did not jump."""
    fitting: Positive = 0.025
    """Share that the first readings of healthy runs come to."""
    min_history: Count = 4
    """Readings that must be known before any is judged."""
    hysteresis: Fraction = 0.6
    """Share of the opening levels above which an open issue stays open."""

    @classmethod
    def symptom_of(cls, issue: StabilityIssue) -> Symptom:
        return RATE if issue.layer is None else STEP

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue for the run, of which ``value`` and ``threshold`` are the rate and the rate at
        which it is too high; else one a layer, of which they are the share of W_q and W_k that the
        step changed and the share at which it is too large."""
        found = (
            self._overshoot(history) or self._of_groups(history) or self._from_the_start(history)
        )
        return found or [
            issue for layer in history.latest.query_key for issue in self._of_layer(history, layer)
        ]

    def _overshoot(self, history: History) -> list[StabilityIssue]:
        found = history.overshoot
        if found is None or (found.how == "brisk" and not _heads_break(history)):
            return []
        used = history.latest.used_rates
        still = {
            key: used[key]
            for key, rate in found.fitting.items()
            if used.get(key, 0.0) > SLACK * rate
        }
        if history.latest.overshoot is not None and found.how != "brisk":
            still = {key: found.rates[key] for key in found.fitting}
        if not still:
            return []
        return [
            _issue(
                history,
                None,
                max(still.values()),
                found.fitting_rate,
                suggestion=_advice(found, history),
                evidence={
                    "found_at": found.step,
                    "how": found.how,
                    "fitting_rate": found.fitting_rate,
                    "fitting_rates": dict(found.fitting),
                    "rates": dict(found.rates),
                    "gain_ratio": found.gain_ratio,
                    "rise": found.rise,
                },
            )
        ]

    def _of_groups(self, history: History) -> list[StabilityIssue]:
        used, updates = history.used_rates or _rate_of_all(history), history.group_updates
        jumped: dict[str, float] = {}
        for key, rates in used.items():
            highest = self._highest_before(rates)
            moves = updates.get(key)
            if (
                moves is None or not np.isfinite(moves).any()
            ):  # nothing is known of the group's parameters: W_q and W_k stand for them
                moves = np.array([_share_moved(reading) for reading in history.readings])
            if highest is not None and self._moves_far(history, moves):
                jumped[key] = highest
        if not jumped:
            return []
        now = {key: float(used[key][-1]) for key in jumped}
        worst = max(jumped, key=lambda key: now[key] / jumped[key])
        whole = len(jumped) == len(used)
        which = (
            "the rate"
            if whole
            else f"the rate of parameter group {', '.join(sorted(jumped))} (optimizer.group, from "
            "0)"
        )
        return [
            _issue(
                history,
                None,
                now[worst],
                self.rate_jump * jumped[worst],
                suggestion=(
                    f"Look at the schedule and the parameter groups: {which} is {now[worst]:.2g}, "
                    f"{now[worst] / jumped[worst]:.0f} times "
                    f"the highest before, {jumped[worst]:.2g}. Cap it there, and go back to a "
                    "checkpoint before this step."
                ),
                evidence={
                    "highest_rate_before": jumped[worst],
                    "highest_rates_before": {key: rate for key, rate in jumped.items() if key},
                    "rates": now,
                    "updates": {key: float(updates[key][-1]) for key in jumped if key in updates},
                    "query_key_update": _share_moved(history.latest),
                },
            )
        ]

    def _moves_far(self, history: History, moves: np.ndarray) -> bool:
        """Whether a step moves parameters by a larger share of themselves than it used to, and by
        more than most bear.
        """
        past = moves[-PAST + 1 : -1]
        usual = (
            float(np.median(past[np.isfinite(past)])) if np.isfinite(past).any() else float("nan")
        )
        is_open = history.is_open_at("update_spike")
        level = np.fmax(self.update_jump * usual * (self.hysteresis if is_open else 1.0), 0.0)
        return bool(moves[-1] >= level) and bool(moves[-1] > 0)

    def _from_the_start(self, history: History) -> list[StabilityIssue]:
        first = history.readings[:FIRST]
        shares = np.array([_share_moved(reading) for reading in first])
        rates = [reading.learning_rate for reading in first]
        twice = np.fmin(shares[1:], shares[:-1])
        moved, now = (
            _share_moved(history.latest),
            max(history.latest.used_rates.values(), default=history.latest.learning_rate),
        )
        if (
            not _heads_break(history)
            or len(history) >= history.length
            or not (twice >= self.update).any()
            or now is None
        ):
            return []
        worst = int(np.nanargmax(shares))
        fitting = float((rates[worst] or now) * self.fitting / shares[worst])
        if not (moved >= self.hysteresis * self.update and now > fitting):
            return []
        return [
            _issue(
                history,
                None,
                now,
                fitting,
                suggestion=(
                    f"The rate is too high from the start: a step changed {shares[worst]:.0%} of "
                    "W_q and W_k. Start again with a peak rate "
                    f"of {fitting:.2g} or a longer warm-up, or cap it there now "
                    "(cap_learning_rate)."
                ),
                evidence={
                    "fitting_rate": fitting,
                    "query_key_update": moved,
                    "largest_query_key_update": float(shares[worst]),
                },
            )
        ]

    def _of_layer(self, history: History, layer: str) -> list[StabilityIssue]:
        readings = [reading for reading in history.readings[-PAST:] if layer in reading.query_key]
        shares = np.array([reading.query_key[layer].relative_update for reading in readings])
        updates = np.array([reading.query_key[layer].update for reading in readings])
        if len(shares) < self.min_history + 2 or not np.isfinite(shares[-1]):
            return []
        usual, level = (
            float(np.nanmedian(shares[:-2])),
            history.open_level_at("update_spike", layer),
        )
        shares = shares[-2:] * (updates[-2:] >= 0.5 * self.layer_jump * np.nanmedian(updates[:-2]))
        is_open = np.isfinite(level)
        if not is_open:
            level = max(self.update, self.layer_jump * usual)
        if not (shares[-1] >= self.hysteresis * level if is_open else (shares >= level).all()):
            return []
        return [
            _issue(
                history,
                layer,
                float(shares[-1]),
                float(level),
                suggestion=(
                    "Look at what else moves this layer's queries and keys: a step changes "
                    f"{shares[-1]:.0%} of them, "
                    f"{_known_groups(history)}. Cap what a step changes of them "
                    "(cap_query_key_update)."
                ),
                evidence={"query_key_update": float(shares[-1]), "usual_query_key_update": usual},
            )
        ]

    def _highest_before(self, rates: np.ndarray) -> float | None:
        """The largest rate before the jump that the newest is still above; None where there is none
        such.
        """
        highest, jumped = 0.0, False
        for known, rate in enumerate(rates[np.isfinite(rates)].tolist()):
            level = self.rate_jump * highest * (self.hysteresis if jumped else 1.0)
            jumped = known >= self.min_history and 0 < level <= rate
            if not jumped:
                highest = max(highest, rate)
        return highest if jumped and len(rates) and np.isfinite(rates[-1]) else None


def _advice(found: Overshoot, history: History) -> str:
    """What was seen, then the rate to set."""
    several = len(history.latest.learning_rates) > len(found.fitting)
    which = (
        f"the rate of parameter group {', '.join(sorted(found.fitting))} (optimizer.group, from 0)"
        if several
        else "the rate"
    )
    seen = {
        "brisk": f"the first step gained {_share(found.gain_ratio)} of what its gradient foretold "
        "on its own batch, and heads break",
        "first_step": f"the first step gained {_share(found.gain_ratio)} of what its gradient "
        "foretold on its own batch",
        "steps": f"steps gain {_share(found.gain_ratio)} of what their gradients foretell on "
        "their own batches",
        "torn": f"step {found.step} raised the loss of its own batch by {found.rise:.0%}",
        "leap": f"the loss leapt {found.rise:.0%} above the largest before",
    }[found.how]
    return (
        f"Lower {which} to {found.fitting_rate:.2g}: at {found.rate:.2g} {seen}. Start again "
        "there, or from a checkpoint before "
        f"step {found.step}; what attention does after it follows from this."
    )


def _rate_of_all(history: History) -> dict[str, np.ndarray]:
    """The largest rate over groups, where readings do not tell of each."""
    return {
        "": np.array(
            [np.nan if r.learning_rate is None else r.learning_rate for r in history.readings]
        )
    }


def _heads_break(history: History) -> bool:
    """Whether an issue of growing scores or collapsing entropy is open at any head."""
    return any(history.is_open(kind).any() for kind in ("logit_growth", "entropy_collapse"))


def _share(ratio: float) -> str:
    return "nothing" if ratio <= 0 else f"{ratio:.0%}"


def _known_groups(history: History) -> str:
    """What is known of the rates of parameter groups, for a layer that is moved too far."""
    groups = len(history.latest.learning_rates)
    return (
        "and no optimizer's rate is known"
        if not groups
        else f"and no rate of the {groups} known parameter group(s) jumped"
    )


def _issue(
    history: History,
    layer: str | None,
    value: float,
    threshold: float,
    *,
    suggestion: str,
    evidence: Mapping[str, Any],
) -> StabilityIssue:
    return StabilityIssue(
        history.latest.step,
        layer,
        None,
        "update_spike",
        "error",
        value,
        threshold,
        suggestion=suggestion,
        evidence=evidence,
    )


def _share_moved(reading: Reading) -> float:
    """The median over layers, NaN where unknown."""
    shares = [
        moved.relative_update
        for moved in reading.query_key.values()
        if np.isfinite(moved.relative_update)
    ]
    return float(np.median(shares)) if shares else float("nan")
