"""ZClip, adaptive clipping of gradient spikes, written out from its paper.

Kumar et al. 2025, arXiv:2504.02507: the z-score of the gradient norm against exponential moving
averages of its mean and variance; a spike is clipped, the more the higher it is, and enters the
averages as the value it is clipped to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DECAY, LIMIT, WARMUP = 0.97, 2.5, 25
"""Decay of the averages, z-score of a spike, and steps before the first (the paper's values)."""


class ZClip:
    """The averages of gradient norms, and what they clip a norm to."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._steps = 0
        self._mean = self._variance = 0.0

    def clipped(self, norm: float) -> float:
        """Add the norm of a step before any clipping, and return that to clip it to.

        A norm that is not finite is clipped to the mean.
        """
        self._steps += 1
        if self._steps <= WARMUP:
            self._first += [norm] if np.isfinite(norm) else []
            if self._first:
                self._mean, self._variance = float(np.mean(self._first)), float(np.var(self._first))
            return norm if np.isfinite(norm) else self._mean
        deviation = self._variance**0.5
        score = (norm - self._mean) / (deviation + 1e-6)
        if not score <= LIMIT:
            more = LIMIT**2 / score * deviation if np.isfinite(score) else 0.0
            norm = self._mean + more
        self._mean = DECAY * self._mean + (1 - DECAY) * norm
        self._variance = DECAY * self._variance + (1 - DECAY) * (norm - self._mean) ** 2
        return norm


def spikes(norms: Sequence[float]) -> list[int]:
    """Return the indices of gradient norms that ZClip would clip.

    Args:
        norms: gradient norm of each step before any clipping; one that is not finite is a spike.
    """
    zclip = ZClip()
    return [at for at, norm in enumerate(norms) if zclip.clipped(norm) != norm]
