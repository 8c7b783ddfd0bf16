"""ZClip's detector of gradient spikes, written out from its paper.

Kumar et al. 2025, arXiv:2504.02507: the z-score of the gradient norm against exponential moving
averages of its mean and variance; a spike enters the averages as the value it is clipped to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DECAY, LIMIT, WARMUP = 0.97, 2.5, 25
"""Decay of the averages, z-score of a spike, and steps before the first (the paper's values)."""


def spikes(norms: Sequence[float]) -> list[int]:
    """Return the indices of gradient norms that ZClip would clip.

    Args:
        norms: gradient norm of each step before any clipping; one that is not finite is a spike.
    """
    first = [norm for norm in norms[:WARMUP] if np.isfinite(norm)]
    found = [at for at, norm in enumerate(norms[:WARMUP]) if not np.isfinite(norm)]
    mean, variance = (float(np.mean(first)), float(np.var(first))) if first else (0.0, 0.0)
    for at in range(WARMUP, len(norms)):
        norm, deviation = norms[at], variance**0.5
        score = (norm - mean) / (deviation + 1e-6)
        if not score <= LIMIT:
            found.append(at)
            norm = mean + LIMIT**2 / score * deviation if np.isfinite(score) else mean
        mean = DECAY * mean + (1 - DECAY) * norm
        variance = DECAY * variance + (1 - DECAY) * (norm - mean) ** 2
    return found
