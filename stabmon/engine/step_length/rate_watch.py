"""Notice that steps are too long, from the first one on: by what each did to its own batch, and by
a loss that leaps.
"""

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
"""Times the highest rate that was probed at which it is probed again: 19 times on the way up a
warm-up of 2000 steps.
"""
EARLY = (1, 2, 4, 8, 16, 32)
"""Steps since the start that are probed whatever the rate does."""
FIRST = 0.15
"""Gain ratio of the very first step below which the rate is too high. Without a warm-up Adam's
first step moves every weight by the rate, and brisk runs that ended well came to 0.25; those that a
rate ruined to 0.13 and less, trained weights below 0."""
BRISK = 0.35
"""Gain ratio of the very first step below which the rate is too high if heads break in the first
steps; at the usual rates it was 0.5 and more."""
LOW = 0.3
"""Median gain ratio of ``BURST`` steps in a row below which they are too long. A quadratic's best
step has 1/2; small runs that ended healthy stayed above 0.42 but for two at ten times the usual
rate, those that a rate ruined came to 0.33 and less, mostly below 0.1."""
LONG = 0.35
"""The same for the mean of twice as many, each taken as -1/2 at least and 1 at most: what batches
disagree on needs more of them. Healthy runs stayed above 0.42 but for the same two, those that a
rate ruined came to 0.32 and less."""
FINE = 0.6
"""Gain ratio from which on the next steps need not be probed."""
BURST = 4
TORN = 0.25
"""Rise of a step's own objective, over its size, that tears a run by itself; healthy runs came to
0.07.
"""
LEAP = 5.0
"""Spreads of the newest losses, as the differences between neighbours tell it, by which a loss must
lie above the largest to have leapt: so a loss of heavy tails needs a batch that is as far out
again."""
LEAST_LEAP = 1.1
"""Times the largest of the newest losses that it must also be."""
OPEN = 100
"""Steps after a brisk beginning within which heads may break of it, and no later state counts as
healthy.
"""
YOUNG = 200
"""Steps since the rate was last higher than ever within which a leap of the loss is taken for the
rate's doing.
"""
How = Literal["first_step", "brisk", "steps", "torn", "leap"]
"""See :class:`~stabmon.records.Overshoot`."""
_KNOWN = 12
"""Losses that must be known before one can leap."""
_BACK = 0.25
"""Share of the rate that tore a run that is told to fit it, where no step could be probed."""


class RateWatch:
    """Decides at which steps to probe and what to conclude.

    What is free is looked at in every step: the rate of each group, and the loss. Steps are probed
        while rates are higher than any that
    was probed before, and in the first steps of a run; a healthy one gives a single good probe each
    time.
    """

    def __init__(self) -> None:
        self._probed: dict[str, float] = {}
        self._fine: dict[str, float] = {}
        self._first: int | None = None
        self._risen = self._step = 0
        self._burst: list[StepQuality] = []
        self._losses: deque[float] = deque(maxlen=64)
        self.found: Overshoot | None = None
        """The newest finding."""

    def wants(self, step: int, rates: Mapping[str, float]) -> bool:
        """Whether to probe the step that begins, at these rates."""
        self._step = step
        if self._first is None:
            self._first, self._risen = step, step
        early = step - self._first + 1 in EARLY
        return early or bool(self._burst) or self.rises(step, rates)

    def rises(self, step: int, rates: Mapping[str, float]) -> bool:
        """Whether some group's rate is clearly higher than any that was probed."""
        higher = any(
            rate > RISE * self._probed.get(key, 0.0) for key, rate in rates.items() if rate > 0
        )
        if higher:
            self._risen = step
        return higher

    @property
    def uneasy(self) -> bool:
        """Whether it is still open what comes of the newest steps: a probe was not good, or a run
        began briskly and heads may break.
        """
        brisk = (
            self.found is not None
            and self.found.how == "brisk"
            and self._step - self.found.step <= OPEN
        )
        return bool(self._burst) or brisk

    def judge(self, quality: StepQuality | None, rates: Mapping[str, float]) -> How | None:
        """Take note of a probed step; in which way it is too long, or None."""
        if quality is None or math.isnan(quality.gain_ratio):
            self._burst = []
            if quality is not None:
                self._note(rates)
            return None
        self._note(rates)
        self._burst.append(quality)
        ratios = sorted(each.gain_ratio for each in self._burst[-BURST:])
        if quality.rise >= TORN:
            return "torn"
        if quality.step == self._first and quality.gain_ratio < BRISK:
            return "first_step" if quality.gain_ratio < FIRST else "brisk"
        if len(ratios) == BURST and (ratios[1] + ratios[2]) / 2 < LOW:
            return "steps"
        if (
            len(self._burst) == 2 * BURST
            and fmean(min(max(each.gain_ratio, -0.5), 1.0) for each in self._burst) < LONG
        ):
            return "steps"
        if quality.gain_ratio >= FINE:
            self._fine = {key: max(rate, self._fine.get(key, 0.0)) for key, rate in rates.items()}
        if quality.gain_ratio >= FINE or len(self._burst) >= 2 * BURST:
            self._burst = []
        return None

    def note_loss(self, step: int, loss: float) -> float | None:
        """Take note of a step's loss; how many times the largest before it has leapt to, where that
        shows that the run is torn.
        """
        if not math.isfinite(loss):
            return None
        known = list(self._losses)
        self._losses.append(loss)
        if len(known) < _KNOWN or step - self._risen > YOUNG:
            return None
        largest = max(known)
        if loss <= LEAST_LEAP * largest or min(known) <= 0:
            return None
        spread = float(robust_spread(np.diff(known)[:, None])[0]) / 2**0.5
        return loss / largest if loss > largest + LEAP * spread else None

    def conclude(
        self,
        step: int,
        how: How,
        rates: Mapping[str, float],
        factors: Mapping[str, float],
        **more: float,
    ) -> Overshoot:
        """Keep a finding: the rates used, and by which factor those that are too high are to be
        lower.
        """
        self._burst = []
        fitting = {
            key: min(rates[key] * factor, self._fine.get(key, math.inf))
            for key, factor in factors.items()
            if key in rates
        }
        values: dict[str, float] = {"gain_ratio": math.nan, "rise": math.nan} | more
        self.found = Overshoot(
            step, how, values["gain_ratio"], values["rise"], dict(rates), fitting
        )
        return self.found

    def torn(self, step: int, ratio: float, rates: Mapping[str, float]) -> Overshoot:
        """The same for a loss that leapt, after which no step is left to probe: rates that were
        fine before may have torn it.
        """
        self._fine = {
            key: rate for key, rate in self._fine.items() if rate < 0.9 * rates.get(key, 0.0)
        }
        return self.conclude(step, "leap", rates, dict.fromkeys(rates, _BACK), rise=ratio - 1)

    def begin_again(self) -> None:
        """The run goes on from an earlier state, at other rates: its losses and rates are not those
        of what was left.
        """
        self._burst = []
        self._losses.clear()
        self._probed, self._first = {}, None

    def found_since(self, step: int) -> Overshoot | None:
        """The newest finding, if it was made after ``step``."""
        return self.found if self.found is not None and self.found.step > step else None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain values."""
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
        """Read a state whole, and return what takes it up; None and a stored None leave everything
        as it is.

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
