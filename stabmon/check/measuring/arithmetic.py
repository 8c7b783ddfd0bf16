"""What scores, entropies and number formats do, in closed form. n keys, D head dimension, sigma the
standard deviation of a row's scores.

The scores of a row at initialisation are close to normal and independent, so a row is a random
energy model: its softmax spreads over about ``n exp(-sigma^2)`` keys until sigma reaches ``sqrt(2
ln n)``, where it condenses on a few (Derrida 1981).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.special import ndtri

from stabmon._torch.number_formats import SCORE_ERROR, TOTAL_VARIATION


def critical_spread(keys: int) -> float:
    """The sigma at which a softmax over ``keys`` condenses, ``sqrt(2 ln n)``: from here on a row
    looks at a few keys whatever n is.

    >>> round(critical_spread(1024), 2)
    3.72
    """
    return math.sqrt(2 * math.log(max(keys, 2)))


def expected_maximum(sigma: float, count: float) -> float:
    """Largest of ``count`` independent scores of standard deviation ``sigma``: ``sigma sqrt(2 ln
    count)``, an upper bound of the mean.

    >>> round(expected_maximum(0.307, 1024), 2)
    1.14
    """
    return sigma * math.sqrt(2 * math.log(max(count, 1.0)))


def expected_entropy(sigma: float, keys: int, softcap: float | None = None) -> float:
    """Entropy in nats of a softmax over ``keys`` normal scores, at the quantiles ``(j - 1/2) / n``;
    exact for large n and small sigma.

    Returns:
        In ``[0, ln n]``; close to ``ln n - sigma^2 / 2`` well below :func:`critical_spread`.

    >>> round(math.log(4096) - expected_entropy(1.0, 4096), 2)
    0.5
    """
    if keys < 2:
        return 0.0
    scores = sigma * _quantiles(keys)
    log_p = torch.log_softmax(
        scores if softcap is None else softcap * torch.tanh(scores / softcap), dim=0
    )
    return float(-(log_p.exp() * log_p).sum())


def bits_needed(largest: float) -> float:
    """Mantissa bits that hold scores up to ``largest`` in magnitude so that rounding moves a
    softmax by at most ``TOTAL_VARIATION``.

    ``log2(max|z| / (2 artanh eps))``; negative for small scores, -inf for 0.

    >>> round(bits_needed(100.0), 2)
    8.96
    """
    return math.log2(largest / SCORE_ERROR) if largest > 0 else -math.inf


def curvature_bits(curvature: float, squared_size: float) -> float:
    """Bits at which rounding query and keys of squared norm ``squared_size`` stays within the
    softmax's linear regime.

    The second-order term of a relative rounding ``2^-b`` is at most ``curvature 4^-b
    squared_size``; asking that it stay below ``TOTAL_VARIATION`` gives b. Half of the HNF
    programme's ``log2(kappa D^2 / eps)``, whose error term is of first order.

    >>> curvature_bits(0.1, 4.0)
    1.0
    """
    product = curvature * squared_size / TOTAL_VARIATION
    return 0.5 * math.log2(product) if product > 0 else -math.inf


def expected_curvature(sigma: float, keys: int, head_dim: int, scale: float) -> tuple[float, float]:
    """Tight bound on a typical row's curvature in (query, keys) at initialisation, and the squared
    norm of query and keys together.

    ``lambda [scale^2 (|q|^2 + |K|_2^2) / sqrt 2 + scale / 2]`` with the largest probability m in
    ``lambda <= min(m, 2m(1-m))``; query and keys are taken alike in size, ``|q|^2 = D s^2`` with
    ``scale sqrt(D) s^2 = sigma``, and ``|K|_2 = s (sqrt n + sqrt D)``.
    """
    size = sigma / (abs(scale) * math.sqrt(head_dim))
    query, keys_spectral = head_dim * size, size * (math.sqrt(keys) + math.sqrt(head_dim)) ** 2
    m = float(torch.softmax(sigma * _quantiles(keys), dim=0)[-1])
    bound = min(m, 2 * m * (1 - m)) * (
        scale**2 * (query + keys_spectral) / math.sqrt(2) + abs(scale) / 2
    )
    return bound, query + keys_spectral


@functools.lru_cache(maxsize=32)
def _quantiles(keys: int) -> Tensor:
    """``[n]`` normal quantiles at ``(j - 1/2) / n``, ascending, float64."""
    found: Tensor = ndtri((torch.arange(keys, dtype=torch.float64) + 0.5) / keys)
    return found
