"""Optimizer steps that are too long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stabmon._settings import Count, Fraction, Positive, renamed
from stabmon.records import Overshoot, StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.group_ahead import ahead_advice, groups_ahead
from stabmon.rules.evidence.robust_stats import median_over_steps
from stabmon.rules.evidence.step_size import (
    decay_advice,
    heads_break,
    highest_before_jump,
    jump_advice,
    name_rates,
    overshoot_advice,
    rates_of_groups,
    rates_too_high,
    shares_of_largest,
    update_share,
)
from stabmon.rules.symptoms import DECAY, RATE, STEP, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, share
from stabmon.rules.wording.rates import describe_rate, named_groups

PAST = 22
"""Number of newest readings in the past of a step's size.

The median of all but the last two is the usual size.
"""

FIRST, FIRST_STEPS = 8, 40
"""Readings, and optimizer steps, that show whether the rate was too high from the start."""


@rule
@renamed(least_past="min_history", still_ill="hysteresis")
@dataclass(frozen=True)
class UpdateSpike(Rule):
    r"""Steps too long for the model, a group or a layer.

    With :math:`u = \|\Delta W\| / \|W\|` of a step, the first of these that holds:

    - overshoot: steps were seen to gain far less on their own batch than the gradient foretold, or
      to raise its loss (:class:`~stabmon.records.Overshoot`): the rate is too high, whatever the
      weights are, from the first step on. The rate that fits is reported, and stays so until the
      rate used comes down to it. Attributed to no layer.
    - jump of a rate: the rate of a parameter group rose manifold over the largest that the group
      had before, and its steps move it far: a slip in a schedule or a group. A warm-up rises by
      little from step to step, a warm restart comes back to a rate that was there before, and a
      schedule that changes by the epoch makes short steps still: none of them counts. Names the
      group. Rates are compared at every step, and at readings where optimizers take no hooks.
    - jump of the weight decay: it rose manifold in one step, and takes 0.5% of a group's weights or
      more in each step. Names the group.
    - too high from the start, where steps cannot be probed: from the first readings on two in a row
      moved W_q and W_k by more than any healthy run's, and heads have broken since. The rate that
      fits is reported, at which a step would have changed ``fitting`` of them.
    - one group ahead: the group of W_q and W_k has a multiple of the other groups' rate and moves
      by a multiple of their u, and heads have broken since. Names the group, and the multiple of
      the others' rate at which it would move as they do.
    - jump of one layer: no rate rose, and yet a layer's queries and keys are moved ``layer_jump``
      times as far as before in two readings one after the other. Weights that became smaller, and
      are moved as ever, do not count. Attributed to the layer. One gradient that bursts moves
      Adam's step by less (0.1 / sqrt(1 - beta2) of its usual size, 3.2 times at 0.999), and neither
      it nor a single jump of the weights comes twice.

    Example:
        >>> from stabmon.records import QKUpdate, Reading
        >>> history = History()
        >>> for step in range(1, 11):
        ...     rate, moved = (1e-2, 0.4) if step > 8 else (1e-4, 0.004)
        ...     history.add(Reading(
        ...         step, None, {}, learning_rate=rate,
        ...         query_key={"attn": QKUpdate(gradient=1.0, weight=1.0, update=moved)}))
        >>> UpdateSpike().check(history)
        [StabilityIssue(error update_spike, run, step 10, value 0.01, threshold 0.0004)]

    References:
        Cohen et al. 2021, arXiv:2103.00065, on steps too long for the curvature; Molybog et al.
        2023, arXiv:2304.09871, on bursts of Adam's step.
    """

    symptom: ClassVar[Symptom] = RATE
    quantity: ClassVar[str] = "size of steps"
    reads: ClassVar[tuple[str, ...]] = ("query_key",)
    cause_rank: ClassVar[int] = 0
    explains_others: ClassVar[bool] = True

    rate_jump: Positive = 4.0
    """Rise of a group's rate, as a multiple of its largest rate so far."""
    update: Positive = 0.08
    """Least share of W_q and W_k for one step to change.

    Healthy runs were seen to change up to 0.05 once they are warm.
    """
    update_jump: Positive = 3.0
    """Rise of a group's u, as a multiple of its median over the newest readings."""
    moved: Positive = 0.05
    """Share of a group for one step to change from which a jump of its rate counts.

    Of a group that jumps alone ``update_jump`` times the other groups' median is enough. Steps of
    healthy groups, once warm, stayed below 0.04; rates that change by the epoch may jump.
    """
    layer_jump: Positive = 6.0
    """Rise of a layer's u, as a multiple of its own past, where no rate jumped."""
    fitting: Positive = 0.025
    """Share of W_q and W_k that a step changes in the first readings of healthy runs."""
    min_history: Count = 4
    """Number of readings needed before any is judged."""
    hysteresis: Fraction = 0.6
    """Closing level, as a share of the opening level."""

    @classmethod
    def symptom_of(cls, issue: StabilityIssue) -> Symptom:
        """Return rate or decay for an issue of the run, step for one of a layer."""
        if issue.layer is not None:
            return STEP
        return DECAY if issue.evidence.get("how") == "decay" else RATE

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest rate for an issue of the run, the newest update for one of a layer."""
        if issue.layer is None:
            decay = issue.evidence.get("how") == "decay"
            used = history.latest.weight_decays if decay else history.latest.used_rates
            named = named_groups(issue.evidence)
            rates = [rate for key, rate in used.items() if not named or key in named]
            return max(rates, default=history.latest.learning_rate)
        moved = history.latest.query_key.get(issue.layer)
        return None if moved is None else moved.relative_update

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the rate beside the one that fits in words, or the update of a layer."""
        worst = issues[0]
        if worst.layer is not None:
            usual = known(worst.evidence, "usual_query_key_update")
            numbers = f"a step changes {share(worst.value)} of W_q and W_k"
            numbers += "" if usual is None else f", usually {share(usual)}"
            return Description("steps too long for W_q and W_k", numbers, worst.suggestion)
        return describe_rate(worst, framework)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue for the run, else one for each layer that is moved too far.

        For the run ``value`` is the rate and ``threshold`` the rate at which it is too high; for a
        layer they are the share of W_q and W_k that the step changed, and the share at which it is
        too large.
        """
        found = (
            self._overshoot(history)
            or self._rate_jump(history)
            or self._ahead(history)
            or self._from_the_start(history)
        )
        return found or [
            issue for layer in history.latest.query_key for issue in self._of_layer(history, layer)
        ]

    def _overshoot(self, history: History) -> list[StabilityIssue]:
        """Return the issue of steps that were found to be too long, while the rate is."""
        found, rates = history.overshoot, rates_too_high(history)
        if found is None or not rates:
            return []
        if found.how == "decay":
            return [_decay(history, found, rates)]
        if found.how == "jump":
            return [self._jump(history, found, rates)]
        evidence = {
            "found_at": found.step,
            "how": found.how,
            "fitting_rate": found.fitting_rate,
            "fitting_rates": dict(found.fitting),
            "rates": dict(found.rates),
            "gain_ratio": found.gain_ratio,
            "rise": found.rise,
        }
        highest, advice = max(rates.values()), overshoot_advice(found, history)
        return [_issue(history, None, highest, found.fitting_rate, advice, evidence)]

    def _jump(
        self, history: History, found: Overshoot, rates: Mapping[str, float]
    ) -> StabilityIssue:
        """Return the issue of groups whose rate was seen to jump at a step."""
        before = found.fitting
        worst = max(rates, key=lambda key: rates[key] / before[key])
        evidence = {
            "found_at": found.step,
            "how": found.how,
            "highest_rate_before": before[worst],
            "highest_rates_before": dict(before),
            "rates": dict(found.rates),
            "fitting_multiples": dict(found.multiples),
            "updates": dict(found.updates),
            "groups": dict(found.groups),
        }
        level, advice = self.rate_jump * before[worst], jump_advice(found)
        return _issue(history, None, rates[worst], level, advice, evidence)

    def _rate_jump(self, history: History) -> list[StabilityIssue]:
        """Return the issue of parameter groups whose rate jumped."""
        used, updates = rates_of_groups(history), history.group_updates
        highest = {
            key: before
            for key, rates in used.items()
            if (
                before := highest_before_jump(
                    rates,
                    jump=self.rate_jump,
                    hysteresis=self.hysteresis,
                    min_history=self.min_history,
                )
            )
            is not None
        }
        rest = [moves[-1] for key, moves in updates.items() if key not in highest]
        others = float(np.nanmedian(rest)) if np.isfinite(rest).any() else float("nan")
        jumped: dict[str, float] = {}
        for key, before in highest.items():
            moves = updates.get(key)
            if moves is None or not np.isfinite(moves).any():
                # nothing is known of the group's parameters: W_q and W_k stand for them
                moves = np.array([update_share(reading) for reading in history.readings])
            if self._moves_far(history, moves, others):
                jumped[key] = before
        if not jumped:
            return []
        now = {key: float(used[key][-1]) for key in jumped}
        worst = max(jumped, key=lambda key: now[key] / jumped[key])
        before = jumped[worst]
        suggestion = (
            "Look at the schedule and the parameter groups: "
            f"{'the rate' if len(jumped) == len(used) else name_rates(jumped)} is "
            f"{now[worst]:.2g}, {now[worst] / before:.0f} times the highest before, {before:.2g}. "
            "Cap it there, and go back to a checkpoint before this step."
        )
        evidence = {
            "highest_rate_before": before,
            "highest_rates_before": {key: rate for key, rate in jumped.items() if key},
            "rates": history.latest.used_rates or now,
            "updates": {key: float(updates[key][-1]) for key in jumped if key in updates},
            "query_key_update": update_share(history.latest),
        }
        return [_issue(history, None, now[worst], self.rate_jump * before, suggestion, evidence)]

    def _moves_far(self, history: History, moves: np.ndarray, others: float) -> bool:
        """Return True if a step moves parameters by far more of themselves than before.

        Args:
            history: the readings so far.
            moves: ``[T]`` share of themselves by which steps moved them.
            others: median of that over the groups whose rate did not jump; NaN if unknown.
        """
        past, steps = moves[-PAST + 1 : -1], history.steps[-PAST + 1 : -1]
        usual = float(median_over_steps(past[:, None], steps)[0]) if len(past) else float("nan")
        slack = self.hysteresis if history.is_open_at("update_spike") else 1.0
        least = np.fmin(self.moved, self.update_jump * others)
        level = np.fmax(self.update_jump * usual, least) * slack
        return bool(moves[-1] >= level)

    def _ahead(self, history: History) -> list[StabilityIssue]:
        """Return the issue of the group of W_q and W_k, where it alone is too fast."""
        found = groups_ahead(history) if heads_break(history) else {}
        if not found:
            return []
        worst = max(found.values(), key=lambda each: each.times_update)
        evidence = {
            "found_at": max(each.found_at for each in found.values()),
            "how": "ahead",
            "fitting_rate": worst.fitting_rate,
            "fitting_rates": {key: each.fitting_rate for key, each in found.items()},
            "fitting_multiples": {key: each.multiple for key, each in found.items()},
            "rates": history.latest.used_rates,
            "times_other_updates": worst.times_update,
            "query_key_update": update_share(history.latest),
            "largest_query_key_update": float(
                np.nanmax([update_share(each) for each in history.readings])
            ),
        }
        return [
            _issue(history, None, worst.rate, worst.fitting_rate, ahead_advice(found), evidence)
        ]

    def _from_the_start(self, history: History) -> list[StabilityIssue]:
        """Return the issue of a rate that was too high from the first readings on."""
        if len(history) >= history.length or not heads_break(history):
            return []
        start = history.readings[0].step + FIRST_STEPS
        first = [r for at, r in enumerate(history.readings) if at < FIRST or r.step < start]
        every = shares_of_largest(history.readings)
        shares, moved = every[: len(first)], float(every[-1])
        rates = [reading.learning_rate for reading in first]
        twice = np.fmin(shares[1:], shares[:-1])
        now = max(history.latest.used_rates.values(), default=history.latest.learning_rate)
        if now is None or not (twice >= self.update).any():
            return []
        worst = int(np.nanargmax(shares))
        fitting = float((rates[worst] or now) * self.fitting / shares[worst])
        if not (moved >= self.hysteresis * self.update and now > fitting):
            return []
        suggestion = (
            f"The rate is too high from the start: a step changed {shares[worst]:.0%} of W_q and "
            f"W_k. Start again with a peak rate of {fitting:.2g} or a longer warm-up, or cap it "
            "there now (cap_learning_rate)."
        )
        evidence = {
            "fitting_rate": fitting,
            "query_key_update": moved,
            "largest_query_key_update": float(shares[worst]),
        }
        return [_issue(history, None, now, fitting, suggestion, evidence)]

    def _of_layer(self, history: History, layer: str) -> list[StabilityIssue]:
        """Return the issue of a layer whose queries and keys are moved too far."""
        level = history.open_level_at("update_spike", layer)
        is_open = bool(np.isfinite(level))
        if not is_open and not history.latest.query_key[layer].relative_update >= self.update:
            return []  # as nearly always; the past need not be looked at
        readings = [reading for reading in history.readings[-PAST:] if layer in reading.query_key]
        shares = np.array([reading.query_key[layer].relative_update for reading in readings])
        updates = np.array([reading.query_key[layer].update for reading in readings])
        if len(shares) < self.min_history + 2 or not np.isfinite(shares[-1]):
            return []
        steps = np.array([reading.step for reading in readings])
        usual = float(median_over_steps(shares[:-2, None], steps[:-2])[0])
        shares = shares[-2:] * (updates[-2:] >= 0.5 * self.layer_jump * np.nanmedian(updates[:-2]))
        if not is_open:
            level = max(self.update, self.layer_jump * usual)
        if not (shares[-1] >= self.hysteresis * level if is_open else (shares >= level).all()):
            return []
        groups = len(history.latest.learning_rates)
        known = (
            f"no rate of the {groups} known parameter group(s) jumped"
            if groups
            else "no optimizer's rate is known"
        )
        suggestion = (
            "Look at what else moves this layer's queries and keys: a step changes "
            f"{shares[-1]:.0%} of them, and {known}. Cap what a step changes of them "
            "(cap_query_key_update)."
        )
        evidence = {"query_key_update": float(shares[-1]), "usual_query_key_update": usual}
        return [_issue(history, layer, float(shares[-1]), float(level), suggestion, evidence)]


def _decay(history: History, found: Overshoot, decays: Mapping[str, float]) -> StabilityIssue:
    """Return the issue of groups whose weight decay was seen to jump at a step."""
    worst = max(decays, key=lambda key: found.updates.get(key, 0.0))
    evidence = {
        "found_at": found.step,
        "how": found.how,
        "decays_before": dict(found.fitting),
        "decays": dict(found.rates),
        "shares_taken": dict(found.updates),
        "groups": dict(found.groups),
    }
    level, advice = max(found.fitting[worst], decays[worst] / 4), decay_advice(found)
    return _issue(history, None, decays[worst], level, advice, evidence)


def _issue(
    history: History,
    layer: str | None,
    value: float,
    threshold: float,
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
        suggestion,
        evidence,
    )
