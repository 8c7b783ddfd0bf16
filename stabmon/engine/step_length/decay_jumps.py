"""Decide whether a parameter group's weight decay has jumped to a share that does damage."""

from __future__ import annotations

from collections.abc import Mapping

from stabmon._torch.optimizer_adapter import ParameterGroup
from stabmon.engine.step_length.past_settings import PastSettings
from stabmon.engine.step_length.setting_jumps import RISE, TRAINED

SHRINK = 0.005
"""Share of the weights that decay takes in a step from which its jump does damage.

Weights then last 200 steps. Usual recipes take 1e-6 to 5e-4, the strongest 2e-3.
"""
COUPLED = ("Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop")
"""Optimizers that add decay to a gradient which they then normalise: its size says nothing."""


class DecayJumps(PastSettings):
    """Largest share that decay took of each group in a step so far.

    Example:
        >>> jumps = DecayJumps()
        >>> for _ in range(8):
        ...     _ = jumps.add({"0.0": 1e-3}, {"0.0": 0.1})
        >>> jumps.find({"0.0": 1e-3}, {"0.0": 30.0})
        {'0.0': 0.1}
    """

    def find(self, rates: Mapping[str, float], decays: Mapping[str, float]) -> dict[str, float]:
        """Return the decay before, of each group whose decay jumps with these.

        Args:
            rates: rate of each group in the step that is about to be made.
            decays: weight decay of each group.
        """
        jumped = self._above(rates, decays) - self._open
        return {key: self._newest[key] for key in decays if key in jumped}

    def add(self, rates: Mapping[str, float], decays: Mapping[str, float]) -> dict[str, float]:
        """Add a step that was made, and return what :meth:`find` found for it."""
        found = self.find(rates, decays)
        above = self._above(rates, decays)
        self._open = (self._open - rates.keys()) | above
        for key in decays.keys() & rates.keys() - above:
            if rates[key] > 0:
                self._newest[key] = decays[key]
                self._highest[key] = max(rates[key] * decays[key], self._highest.get(key, 0.0))
                self._steps[key] = self._steps.get(key, 0) + 1
        return found

    def _above(self, rates: Mapping[str, float], decays: Mapping[str, float]) -> set[str]:
        return {
            key
            for key, decay in decays.items()
            if self._steps.get(key, 0) >= TRAINED
            and decay > self._newest[key]
            and rates.get(key, 0.0) * decay >= max(SHRINK, RISE * self._highest[key])
        }


def shrinks_weights(group: ParameterGroup) -> bool:
    """Return whether a group's decay takes the share rate times decay of its weights."""
    decoupled = group.settings.get("decoupled_weight_decay")
    return bool(decoupled) or (decoupled is None and type(group.optimizer).__name__ not in COUPLED)
