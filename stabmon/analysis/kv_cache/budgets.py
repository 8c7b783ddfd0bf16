"""Division of one cache among layers: keys before the window for each layer.

Two rules take the same claims P and give whole numbers. ``filled`` uses every key there is, in
proportion to P. ``published`` follows CAKE's own code; it leaves keys unused where capped layers
pass on more than their neighbours can take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stabmon.analysis.kv_cache.checks import check_count

Rule = Callable[[ArrayLike, int, int], NDArray[np.int64]]
"""Rule of allotment: ``(claims [L], total, cap) -> budgets [L]``."""


def filled(claims: ArrayLike, total: int, cap: int) -> NDArray[np.int64]:
    """Share ``total`` keys in proportion to the claims.

    Keys that capped layers leave are shared among the rest, likewise. The budget of layer l is
    ``clip(c P_l, 1, cap)`` for the one c with the right sum, rounded down; the keys that rounding
    leaves go to the largest remainders. The sum is always ``min(total, L cap)``. No layer gets 0
    while there is a key for each; with fewer keys than layers, the largest claims get one. Budgets
    rise with P, up to the one key of rounding.

    Args:
        claims: ``[L]`` the layers' preferences, 0 or above; all 0 shares alike.
        total: keys to share, 0 or above.
        cap: the most that a layer can use, 0 or above.

    Returns:
        ``[L]`` int64 in [0, cap].

    Raises:
        ValueError: for claims that are negative, NaN or infinite.

    Example:
        >>> filled([6.0, 1.0, 1.0], total=24, cap=10).tolist()  # 14 keys for the two others
        [10, 7, 7]
    """
    share = _checked(claims)
    count = len(share)
    total, cap = min(int(total), count * int(cap)), int(cap)
    if total <= 0:
        return np.zeros(count, np.int64)
    least = min(1.0, total / count)
    share = np.maximum(share / share.max(), 1e-12) if share.max() > 0 else np.ones(count)
    exact = _clipped(share, total, least, float(cap))
    budgets = np.floor(exact + 1e-9).astype(np.int64)
    order = np.lexsort((np.arange(count), -share, -(exact - budgets)))
    order = order[budgets[order] < cap]
    missing = total - int(budgets.sum())
    for turn in range(missing):
        budgets[order[turn % len(order)]] += 1
    return budgets


def _clipped(
    share: NDArray[np.float64], total: int, least: float, cap: float
) -> NDArray[np.float64]:
    """Return ``clip(c share, least, cap)`` for the c with sum ``total``.

    The c is found exactly, between the two bends of the sum around it.
    """

    def amounts(factor: float) -> NDArray[np.float64]:
        return np.clip(factor * share, least, cap)

    bends = np.unique(np.concatenate([least / share, cap / share]))
    sums = np.clip(bends[:, None] * share, least, cap).sum(1)
    above = int(np.searchsorted(sums, total))
    if above >= len(bends):
        return amounts(float(bends[-1]))
    high = float(bends[above])
    low = float(bends[above - 1]) if above else 0.0
    middle = (low + high) / 2 * share
    free = (middle > least) & (middle < cap)  # those that grow between the two bends
    slope = float(share[free].sum())
    base = float(amounts(low).sum())
    return amounts(low + (total - base) / slope if slope > 0 else high)


def published(claims: ArrayLike, total: int, cap: int) -> NDArray[np.int64]:
    """Share ``total`` keys as the code published with CAKE does.

    Each share P / sum(P) total is cut to a whole number and to the cap. The keys cut off by the cap
    go in *equal* parts to the layers below the cap, the remainder of that division to the first of
    them; once. The keys then missing from the total go the same way, once. Budgets are cut to the
    cap again, and keys lost by that stay unused: the sum is at most ``total``.

    Args:
        claims: ``[L]`` the layers' preferences, 0 or above; all 0 shares alike (the published code
            fails there).
        total: keys to share, 0 or above.
        cap: the most that a layer can use, 0 or above.

    Returns:
        ``[L]`` int64 in [0, cap]; 0 is possible.

    Raises:
        ValueError: for claims that are negative, NaN or infinite.

    Example:
        >>> published([8.0, 1.0, 1.0], total=24, cap=10).tolist()
        [10, 8, 6]
        >>> published([9.0, 4.0, 1.0], total=29, cap=10).tolist()  # two keys are lost
        [10, 10, 7]
    """
    share = _checked(claims)
    share = share / share.sum() if share.sum() > 0 else np.full(len(share), 1 / len(share))
    wished = (share * total).astype(np.int64)
    budgets = np.minimum(wished, cap)
    _deal(budgets, int((wished - budgets).sum()), cap)
    _deal(budgets, total - int(budgets.sum()), cap)
    return np.minimum(budgets, cap)


def _deal(budgets: NDArray[np.int64], keys: int, cap: int) -> None:
    """Give ``keys`` in equal parts to the layers below the cap, even beyond it.

    The remainder goes to the first layers.
    """
    open_layers = np.flatnonzero(budgets < cap)
    if keys > 0 and len(open_layers):
        each, over = divmod(keys, len(open_layers))
        budgets[open_layers] += each
        budgets[open_layers[:over]] += 1


def _checked(claims: ArrayLike) -> NDArray[np.float64]:
    share = np.asarray(claims, np.float64)
    if share.ndim != 1 or not len(share) or not np.isfinite(share).all() or (share < 0).any():
        raise ValueError(
            f"preferences {share.tolist()}: give one finite number of 0 or above for each layer"
        )
    return share


ALLOTMENTS: dict[str, Rule] = {"filled": filled, "published": published}


def allotment_rule(name: str) -> Rule:
    """Return an allotment rule by name.

    Args:
        name: ``filled`` or ``published``.

    Raises:
        ValueError: for another name.

    Example:
        >>> allotment_rule("filled") is filled
        True
    """
    if name not in ALLOTMENTS:
        raise ValueError(f"allotment {name!r}: give {' or '.join(ALLOTMENTS)}")
    return ALLOTMENTS[name]


def check_cache(cache_size: int | float, window_size: int) -> None:
    """Raise an error for a cache size or window size out of range.

    Args:
        cache_size: a number of tokens, or a share in (0, 1] of each prompt.
        window_size: number of newest keys, 2 or more.

    Raises:
        ValueError: naming the range.

    Example:
        >>> check_cache(64, 1)
        Traceback (most recent call last):
        ValueError: window_size 1: give a whole number of 2 or more
    """
    check_count("window_size", window_size, least=2)
    tokens_of(cache_size, [])


def tokens_of(cache_size: int | float, lengths: Sequence[int]) -> list[int]:
    """Return the number of keys of each sample in each layer and head.

    Args:
        cache_size: a number of tokens, or a share in (0, 1] of each sample's own prompt, rounded to
            the nearest, at least 1.
        lengths: tokens of each sample's prompt.

    Returns:
        One number per sample.

    Raises:
        ValueError: for a size that is neither.

    Example:
        >>> tokens_of(0.25, [100, 40]), tokens_of(64, [100, 40])
        ([25, 10], [64, 64])
    """
    is_int = isinstance(cache_size, int | np.integer) and not isinstance(cache_size, bool)
    if is_int and cache_size >= 1:
        return [int(cache_size)] * len(lengths)
    if isinstance(cache_size, float | np.floating) and 0 < cache_size <= 1:
        return [max(1, math.floor(cache_size * n + 0.5)) for n in lengths]
    raise ValueError(
        f"cache_size {cache_size!r}: give tokens as an int of 1 or more, or a share as a float in "
        "(0, 1]"
    )
