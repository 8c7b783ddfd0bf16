"""Decide at which steps to probe, and conclude from probes and losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

import numpy as np

from stabmon._storage.stored_value import Stored
from stabmon.engine.step_length.probe import StepQuality
from stabmon.records import Overshoot
from stabmon.rules.evidence.robust_stats import robust_spread

RISE = 1.5
"""Times the highest probed rate at which a step is probed again.

That is 19 times on the way up a warm-up of 2000 steps.
"""
EARLY = (1, 2, 4, 8, 16, 32)
"""Steps since the start that are probed at any rate."""
FIRST = 0.15
"""Gain ratio of the first step below which the rate is too high.

Without a warm-up Adam's first step moves every weight by the rate. Brisk runs that ended well came
to 0.25; those that a rate ruined to 0.13 and less, with trained weights below 0.
"""
BRISK = 0.35
"""Gain ratio of the first step below which the rate is too high if heads then break.

At the usual rates it was 0.5 and more.
"""
LOW, BRISK_LOW = 0.15, 0.3
"""Median gain ratio of ``BURST`` steps in a row below which they are too long; if heads then break.

A quadratic's best step has 1/2. Healthy runs with small batches came to 0.24 at the peak of their
rate, others stayed above 0.42; those that a rate ruined came to 0.33 and less, mostly below 0.1.
"""
LONG, BRISK_LONG = 0.2, 0.35
"""The same of the mean over twice ``BURST`` steps in a row.

Each ratio counts as -1/2 at least and 1 at most. Steps on which batches disagree need more of
them. Healthy runs came to 0.24; those that a rate ruined to 0.32 and less.
"""
FINE = 0.6
"""Gain ratio from which on the next steps need not be probed."""
BURST = 4
"""Probed steps in a row that are judged together."""
DIVERGED = 0.25
"""Rise of a step's own objective, over its size, from which the run diverges by it alone.

Healthy runs came to 0.07.
"""
LEAP = 5.0
"""Spreads of the newest losses by which a loss must lie above the largest to have leapt.

The spread is that of differences between neighbours: under heavy tails a batch must be as far out
again.
"""
LEAST_LEAP = 1.1
"""Factor on the largest of the newest losses that a leap must also exceed."""
AT_ONCE = 0.1
"""Least factor by which several steps in a row may lower a rate.

The factor is found on one batch, and steps that still are too long are found again.
"""
OPEN = 100
"""Steps after a brisk first step within which heads may break by it, and no state counts as healthy."""
YOUNG = 50
"""Steps after a new highest rate within which a leap of the loss is attributed to the rate.

Longer where the rise took longer: after as many steps again the rate has proven itself, and a bad
batch or an edit of weights is as likely.
"""
How = Literal["first_step", "brisk", "steps", "torn", "leap"]
"""Kind of evidence for a step that is too long, see :class:`~stabmon.records.Overshoot`."""
_KNOWN = 12
"""Losses that must be known before one can leap."""
_BACK = 0.25
"""Share of the rate that made a run diverge, recommended where no step could be probed."""


class RateWatch:
    """Choice of the steps to probe, and the conclusions from probes and losses.

    The rate of each group and the loss cost nothing and are examined in every step. Steps are
    probed while rates are higher than any that was probed before, and in the first steps of a run;
    a healthy run gives a single good probe each time.

    Example:
        >>> watch = RateWatch()
        >>> watch.wants(1, {"0.0": 1e-3})
        True
        >>> watch.judge(StepQuality(1, gain_ratio=0.1, rise=-0.1), {"0.0": 1e-3})
        'first_step'
    """

    def __init__(self) -> None:
        self._probed: dict[str, float] = {}
        self._fine: dict[str, float] = {}
        self._first: int | None = None
        self._risen = self._step = 0
        self._burst: list[StepQuality] = []
        self._losses: deque[float] = deque(maxlen=64)
        self._leapt_above: tuple[float, float] | None = None
        """Level and largest loss before, where the newest loss has leapt."""
        self.found: Overshoot | None = None
        """The newest finding."""

    def wants(self, step: int, rates: Mapping[str, float]) -> bool:
        """Return whether to probe the step that begins.

        Args:
            step: the step that begins.
            rates: learning rate of each parameter group, by key.
        """
        self._step = step
        if self._first is None:
            self._first, self._risen = step, step
        early = step - self._first + 1 in EARLY
        return early or bool(self._burst) or self.rises(step, rates)

    def rises(self, step: int, rates: Mapping[str, float]) -> bool:
        """Return whether some group's rate is clearly higher than any that was probed."""
        higher = any(
            rate > RISE * self._probed.get(key, 0.0) for key, rate in rates.items() if rate > 0
        )
        if higher:
            self._risen = step
        return higher

    @property
    def is_uncertain(self) -> bool:
        """Return whether the newest steps may yet prove too long.

        A probe was not good, or the run began briskly and heads may break.
        """
        brisk = (
            self.found is not None
            and self.found.how == "brisk"
            and self.found.step == self._first
            and self._step - self.found.step <= OPEN
        )
        return bool(self._burst) or brisk

    def judge(self, quality: StepQuality | None, rates: Mapping[str, float]) -> How | None:
        """Add a probed step.

        Args:
            quality: its measurement; None where it could not be measured.
            rates: the rate that each group used in it.

        Returns:
            The evidence that steps are too long; None if there is none.
        """
        if quality is None or math.isnan(quality.gain_ratio):
            self._burst = []
            if quality is not None:
                self._note(rates)
            return None
        self._note(rates)
        self._burst.append(quality)
        ratios = sorted(each.gain_ratio for each in self._burst[-BURST:])
        if quality.rise >= DIVERGED:
            return "torn"
        if quality.step == self._first and quality.gain_ratio < BRISK:
            return "first_step" if quality.gain_ratio < FIRST else "brisk"
        middle = (ratios[1] + ratios[2]) / 2 if len(ratios) == BURST else math.inf
        bounded = [min(max(each.gain_ratio, -0.5), 1.0) for each in self._burst]
        mean = fmean(bounded) if len(bounded) == 2 * BURST else math.inf
        if middle < LOW or mean < LONG:
            return "steps"
        is_known = self.found is not None and self.found.how != "brisk"
        is_low = mean < BRISK_LONG or (len(bounded) == 2 * BURST and middle < BRISK_LOW)
        if is_low and not is_known:
            return "brisk"
        if quality.gain_ratio >= FINE:
            self._fine = {key: max(rate, self._fine.get(key, 0.0)) for key, rate in rates.items()}
        if quality.gain_ratio >= FINE or len(self._burst) >= 2 * BURST:
            self._burst = []
        return None

    def note_loss(self, step: int, loss: float) -> float | None:
        """Add a step's loss.

        Returns:
            The loss over the largest before it leapt, where it and the one before are above that;
            else None. A single one is a hard batch.
        """
        leapt, self._leapt_above = self._leapt_above, None
        if not math.isfinite(loss):
            return None
        if leapt is not None and loss > leapt[0]:
            self._losses.append(loss)
            return loss / leapt[1]
        known = list(self._losses)
        self._losses.append(loss)
        rise = self._risen - (self._risen if self._first is None else self._first)
        if len(known) < _KNOWN or step - self._risen > max(YOUNG, rise):
            return None
        largest = max(known)
        if min(known) <= 0:
            return None
        spread = float(robust_spread(np.diff(known)[:, None])[0]) / 2**0.5
        level = max(LEAST_LEAP * largest, largest + LEAP * spread)
        self._leapt_above = (level, largest) if loss > level else None
        return None

    def conclude(
        self,
        step: int,
        how: How,
        rates: Mapping[str, float],
        factors: Mapping[str, float],
        **more: float,
    ) -> Overshoot:
        """Keep a finding and return it.

        Args:
            step: the step that was too long.
            how: the evidence.
            rates: the rates used in it.
            factors: factors by which rates that are too high are to be lower, by group.
            **more: ``gain_ratio`` and ``rise``, where measured.
        """
        self._burst = []
        least = AT_ONCE if how == "steps" else 0.0
        fitting = {
            key: min(rates[key] * max(factor, least), self._fine.get(key, math.inf))
            for key, factor in factors.items()
            if key in rates
        }
        values: dict[str, float] = {"gain_ratio": math.nan, "rise": math.nan} | more
        self.found = Overshoot(
            step, how, values["gain_ratio"], values["rise"], dict(rates), fitting
        )
        return self.found

    def conclude_leap(self, step: int, ratio: float, rates: Mapping[str, float]) -> Overshoot:
        """Keep a finding of a loss that leapt, and return it.

        No step is left to probe, and rates that were fine before may have made the run diverge.

        Args:
            step: the step whose loss leapt.
            ratio: the loss over the largest before it.
            rates: the rates used.
        """
        self._fine = {
            key: rate for key, rate in self._fine.items() if rate < 0.9 * rates.get(key, 0.0)
        }
        return self.conclude(step, "leap", rates, dict.fromkeys(rates, _BACK), rise=ratio - 1)

    def reset(self) -> None:
        """Drop losses and rates: the run goes on from an earlier state, at other rates."""
        self._burst, self._leapt_above = [], None
        self._losses.clear()
        self._probed, self._first = {}, None

    def found_since(self, step: int) -> Overshoot | None:
        """Return the newest finding, if it was made after ``step``."""
        return self.found if self.found is not None and self.found.step > step else None

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as plain values."""
        return {
            "probed": dict(self._probed),
            "fine": dict(self._fine),
            "first": self._first,
            "risen": self._risen,
            "burst": [asdict(each) for each in self._burst],
            "losses": list(self._losses),
            "found": None if self.found is None else self.found.to_dict(),
        }

    def parse_state(self, state: Mapping[str, Any] | Stored | None) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it.

        None and a stored None leave everything as it is.

        Raises:
            ValueError: if it is no state of this.
        """
        saved, fresh = Stored.of(state), RateWatch()
        if saved.value is None:
            return lambda: None
        fresh._probed, fresh._fine = saved["probed"].numbers(), saved["fine"].numbers()
        fresh._first = saved["first"].maybe(Stored.integer)
        fresh._risen = fresh._step = saved["risen"].integer()
        fresh._burst = [
            StepQuality(each["step"].integer(), each["gain_ratio"].number(), each["rise"].number())
            for each in saved["burst"].parts()
        ]
        fresh._losses.extend(each.number() for each in saved["losses"].parts())
        fresh.found = saved["found"].maybe(Overshoot.from_dict)
        return lambda: vars(self).update(vars(fresh))

    def _note(self, rates: Mapping[str, float]) -> None:
        for key, rate in rates.items():
            self._probed[key] = max(rate, self._probed.get(key, 0.0))
