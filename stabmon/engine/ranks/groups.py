"""Settings and steps of parameter groups, of all pipeline stages alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stabmon.engine.ranks.merge import GROUP


@dataclass(frozen=True)
class GroupFacts:
    """Facts about each parameter group in one step, by key.

    Optimizers of pipeline stages have groups of the same keys. Of these the rate, the step and the
    decay that are furthest from 0 count: what goes wrong on one stage is larger there.

    Example:
        >>> first = GroupFacts(rates={"0.0": 0.1}, decays={"0.0": 0.01})
        >>> last = GroupFacts(rates={"0.0": 5.0}, factors={"0.0": 0.02}, decays={"0.0": -3.0})
        >>> largest = {
        ...     key: [max(each) for each in zip(values, last.offered()[key])]
        ...     for key, values in first.offered().items()
        ... }
        >>> GroupFacts.of(largest)
        GroupFacts(rates={'0.0': 5.0}, factors={'0.0': 0.02}, updates={}, decays={'0.0': -3.0}, query_key=())
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rate as scheduled."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Share of the rate that was used, where it is not 1."""
    updates: Mapping[str, float] = field(default_factory=dict)
    """Share of the parameters that the step changed."""
    decays: Mapping[str, float] = field(default_factory=dict)
    """Weight decay."""
    query_key: tuple[str, ...] = ()
    """Groups that W_q and W_k are in."""

    def offered(self) -> dict[str, list[float]]:
        """Return numbers of each group, of which ranks take the largest."""
        keys = dict.fromkeys((*self.rates, *self.updates, *self.decays, *self.query_key))
        return {
            f"{GROUP}{key}": [
                _known(self.rates.get(key)),
                _known(self.rates.get(key), self.factors.get(key, 1.0)),
                _known(self.updates.get(key)),
                _known(self.decays.get(key)),
                _known(self.decays.get(key), -1.0),
                float(key in self.query_key),
            ]
            for key in keys
        }

    @classmethod
    def of(cls, largest: Mapping[str, Sequence[float]]) -> GroupFacts:
        """Return the facts of which the largest numbers over ranks are given."""
        groups = {
            key.removeprefix(GROUP): values
            for key, values in largest.items()
            if key.startswith(GROUP)
        }
        rates, factors, updates, decays = {}, {}, {}, {}
        for key, (rate, used, update, decay, negative, _) in groups.items():
            if math.isfinite(rate):
                rates[key] = rate
            if rate > 0 and used != rate:
                factors[key] = used / rate
            if math.isfinite(update):
                updates[key] = update
            if math.isfinite(decay):
                decays[key] = decay if decay >= negative else -negative
        query_key = tuple(key for key, values in groups.items() if values[-1] > 0)
        return cls(rates, factors, updates, decays, query_key)


def _known(value: float | None, times: float = 1.0) -> float:
    return -math.inf if value is None or not math.isfinite(value) else value * times
