"""Closed forms for scores, entropies and rounding.

n keys, D head dimension, sigma the standard deviation of a row's scores. The scores of a row at
initialisation are close to normal and independent, so a row is a random energy model: its softmax
spreads over about ``n exp(-sigma^2)`` keys until sigma reaches ``sqrt(2 ln n)``, where it condenses
on a few (Derrida 1981).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.special import ndtri

from stabmon._torch.number_formats import SCORE_ERROR, TOTAL_VARIATION


def critical_spread(keys: int) -> float:
    """Return the critical sigma of a softmax over ``keys``, ``sqrt(2 ln n)``.

    From here on the softmax condenses: a row looks at a few keys whatever n is.

        >>> round(critical_spread(1024), 2)
        3.72
    """
    return math.sqrt(2 * math.log(max(keys, 2)))


def expected_maximum(sigma: float, count: float) -> float:
    """Return the largest of ``count`` independent normal scores.

    ``sigma sqrt(2 ln count)``, an upper bound of the mean.

    >>> round(expected_maximum(0.307, 1024), 2)
    1.14
    """
    return sigma * math.sqrt(2 * math.log(max(count, 1.0)))


def expected_entropy(sigma: float, keys: int, softcap: float | None = None) -> float:
    """Return the entropy in nats of a softmax over ``keys`` normal scores.

    The scores are taken at the quantiles ``(j - 1/2) / n``; exact for large n and small sigma.

    Args:
        sigma: standard deviation of the scores.
        keys: n.
        softcap: cap of the scores, ``c tanh(z / c)``; None for none.

    Returns:
        In ``[0, ln n]``; close to ``ln n - sigma^2 / 2`` well below :func:`critical_spread`.

    Example:
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
    """Return the mantissa bits for scores up to ``largest`` in magnitude.

    With ``log2(max|z| / (2 artanh eps))`` bits rounding moves a softmax by at most eps =
    ``TOTAL_VARIATION``. Negative for small scores, -inf for 0.

    >>> round(bits_needed(100.0), 2)
    8.96
    """
    return math.log2(largest / SCORE_ERROR) if largest > 0 else -math.inf


def curvature_bits(curvature: float, squared_size: float) -> float:
    """Return the bits for rounding within the softmax's linear regime.

    The second-order term of a relative rounding ``2^-b`` is at most ``curvature 4^-b
    squared_size``; asking that it stay below ``TOTAL_VARIATION`` gives b. Half of the HNF
    programme's ``log2(kappa D^2 / eps)``, whose error term is of first order.

    Args:
        curvature: of the softmax in query and keys.
        squared_size: squared norm of query and keys together.

    Example:
        >>> curvature_bits(0.1, 4.0)
        1.0
    """
    product = curvature * squared_size / TOTAL_VARIATION
    return 0.5 * math.log2(product) if product > 0 else -math.inf


def expected_curvature(sigma: float, keys: int, head_dim: int, scale: float) -> tuple[float, float]:
    """Return a tight bound on a typical row's curvature at initialisation.

    ``lambda [scale^2 (|q|^2 + |K|_2^2) / sqrt 2 + scale / 2]`` with the largest probability m in
    ``lambda <= min(m, 2m(1-m))``; query and keys are taken alike in size, ``|q|^2 = D s^2`` with
    ``scale sqrt(D) s^2 = sigma``, and ``|K|_2 = s (sqrt n + sqrt D)``.

    Args:
        sigma: standard deviation of the scores.
        keys: n.
        head_dim: D.
        scale: factor of the scores.

    Returns:
        The bound on the curvature in (query, keys), and the squared norm of query and keys
        together.
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
    """Return normal quantiles ``[n]`` at ``(j - 1/2) / n``, ascending, float64."""
    found: Tensor = ndtri((torch.arange(keys, dtype=torch.float64) + 0.5) / keys)
    return found
