"""Measure how far a reading has moved from those before it, in one number without a unit."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from stabmon.records import Reading
from stabmon.rules.evidence.baselines import SCORE_FLOOR
from stabmon.rules.evidence.robust_stats import largest

PAST = 5
"""Readings that the newest one is compared with: beyond all of them it has moved.

Noise of a largest score goes beyond the last reading at every other one.
"""
SCORE = math.log(1.5)
"""Growth of ln max-score of some head that counts as 1."""
ENTROPY = 0.25
"""Share of its normalised entropy lost by some head that counts as 1."""
SATURATED = 0.15
"""Rise of the share of a head's saturated rows that counts as 1."""
STEP = math.log(2.0)
"""Growth of ln rate, or of ln update of a group or of a layer's W_q and W_k, that counts as 1."""
_DOUBLE = math.exp(STEP)
GRADIENT = math.log(4.0)
"""Growth of ln gradient norm that counts as 1; single gradients of 3 times the last are common."""
LOSS = 5.0
"""Spreads above the largest recent loss at which the newest loss counts as 1."""
LEAST_LOSSES = 8
"""Losses needed before one is compared with them."""


class Movement:
    """Newest readings and losses of a run, with which each new one is compared.

    Example:
        >>> from stabmon.records import Reading
        >>> movement = Movement()
        >>> for step, score in enumerate([20.0, 22.0, 21.0], start=1):
        ...     movement.add(Reading(step, None, {"attn": {"max_logit": np.array([score])}}))
        >>> now = Reading(4, None, {"attn": {"max_logit": np.array([22.0 * 1.5**2])}})
        >>> round(movement.of(now), 3)
        2.0
    """

    def __init__(self) -> None:
        self._past: deque[dict[str, np.ndarray]] = deque(maxlen=PAST)
        self._losses: deque[float] = deque(maxlen=64)
        self._rates: dict[str, float] = {}
        """Largest rate of each group in the readings that are kept."""
        self._top, self._unit = math.inf, 1.0
        """Largest recent loss, and the distance above it that counts as 1."""

    def add(self, reading: Reading) -> None:
        """Keep a reading to compare later ones with; of one between samples the losses alone."""
        if reading.sampled:
            self._past.append(_values(reading))
            self._rates = dict(reading.used_rates)
        self._add_losses(reading.losses)

    def restore(self, readings: Sequence[Reading], losses: Sequence[tuple[int, float]]) -> None:
        """Keep the newest readings and losses of a run that is resumed."""
        self._past.clear()
        self._losses.clear()
        for reading in readings[-PAST:]:
            self.add(reading)
        self._losses.clear()
        self._add_losses(losses)

    def of(self, reading: Reading) -> float:
        """Return the largest change of anything in a reading, against all that are kept.

        Args:
            reading: a reading that is not kept yet; parts that are not known are empty in it.

        Returns:
            0 where nothing moved, 1 at the change from which to look twice as often, inf where
            something is not finite.
        """
        if reading.non_finite is not None:
            return math.inf
        found = [self.of_losses([loss for _, loss in reading.losses])]
        for name, values in _values(reading).items():
            past = [each[name] for each in self._past if name in each]
            past = [each for each in past if each.shape == values.shape]
            if past and len(values):
                found.append(_change(name, values, np.stack(past)))
        return max(found)

    def has_leapt(self, loss: float | None, rates: Mapping[str, float]) -> bool:
        """Return whether a loss, or the rate of a group against the newest reading's, has moved.

        By two comparisons, for every step.

        Args:
            loss: the loss of one step; None where it is not known.
            rates: the rate of each parameter group.
        """
        if loss is not None and not loss < self._top + self._unit:
            return True
        return any(
            rate >= _DOUBLE * self._rates[key] > 0
            for key, rate in rates.items()
            if key in self._rates
        )

    def of_losses(self, losses: Sequence[float]) -> float:
        """Return how far the losses of the newest steps are above those before; see `of_loss`."""
        if not all(map(math.isfinite, losses)):
            return math.inf
        return self.of_loss(float(np.median(losses))) if losses else 0.0

    def of_loss(self, loss: float) -> float:
        """Return how far a loss is above all recent ones, in units of ``LOSS`` spreads."""
        return max(0.0, (loss - self._top) / self._unit) if math.isfinite(loss) else math.inf

    def _add_losses(self, losses: Sequence[tuple[int, float]]) -> None:
        self._losses.extend(loss for _, loss in losses if math.isfinite(loss))
        known = np.array(self._losses)
        self._top, self._unit = math.inf, 1.0
        if len(known) >= LEAST_LOSSES:
            self._top = float(known.max())
            spread = float(np.median(np.abs(np.diff(known))))
            self._unit = LOSS * max(spread, 1e-3 * float(np.abs(known).max()), 1e-12)


def _values(reading: Reading) -> dict[str, np.ndarray]:
    """Return everything that is compared, as arrays by name."""
    return dict(_parts(reading))


def _parts(reading: Reading) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("max_logit", "normalized_entropy", "saturated_fraction"):
        rows = [signals[name] for signals in reading.layers.values() if name in signals]
        if rows:
            yield name, np.concatenate(rows)
    yield "gradients", _sorted(reading.gradients)
    yield "rates", _sorted(reading.used_rates)
    yield "updates", _sorted(reading.updates)
    moved = {layer: each.relative_update for layer, each in reading.query_key.items()}
    yield "query_key", _sorted(moved)


def _sorted(values: Mapping[str, float]) -> np.ndarray:
    return np.array([values[key] for key in sorted(values)], dtype=np.float64)


def _change(name: str, now: np.ndarray, past: np.ndarray) -> float:
    """Return the largest change of ``[N]`` values against the ``[T, N]`` before them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "max_logit":
            before = np.maximum(largest(past), SCORE_FLOOR)
            change = np.log(np.maximum(now, SCORE_FLOOR) / before) / SCORE
        elif name == "normalized_entropy":
            before = -largest(-past)
            change = np.where(before >= 0.1, (1 - now / before) / ENTROPY, 0.0)
        elif name == "saturated_fraction":
            change = (now - largest(past)) / SATURATED
        else:
            unit = GRADIENT if name == "gradients" else STEP
            change = np.where(largest(past) > 0, np.log(now / largest(past)) / unit, 0.0)
    known = change[~np.isnan(change)]
    return max(0.0, float(known.max())) if len(known) else 0.0
