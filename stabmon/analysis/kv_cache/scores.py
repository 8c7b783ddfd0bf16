"""CAKE's numbers of one layer: dispersion, shift, preference, and key scores.

All are taken from the attention weights ``p`` of the *window*, the last w queries of a prompt, over
the keys before it. The weights are the softmax over all n keys that a query sees, and are not
renormalised after the window's own keys are cut off.

References:
    Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", ICLR 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.analysis.dtypes import sum_dtype
from stabmon.analysis.kv_cache.prompt import PromptLayer


def dispersion(weights: Tensor, before: Tensor) -> Tensor:
    """Sum the entropy of the window queries' attention to the keys before the window.

    ``D = sum over heads h, queries i in W, keys j before W of -p_hij ln p_hij``, with 0 ln 0 = 0.

    Args:
        weights: ``[B, H, w, K]`` attention weights of the window's queries.
        before: ``[B, K]`` bool, the keys before the window.

    Returns:
        ``[B]`` float64 in nats, 0 or above; 0 where no key lies before the window.

    Example:
        >>> weights = torch.tensor([[[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]])
        >>> before = torch.tensor([[True, False, False]])
        >>> round(dispersion(weights, before).item(), 4)  # 2 queries of -0.5 ln 0.5
        0.6931
    """
    terms = -torch.xlogy(weights, weights)
    return terms.masked_fill_(~before[:, None, None], 0.0).sum((1, 2, 3), dtype=sum_dtype(weights))


def shift(weights: Tensor, before: Tensor) -> Tensor:
    """Sum the variance of the attention to each key over the window's queries.

    ``V = sum over heads h, keys j before W of Var_{i in W}(p_hij)``, unbiased (divided by w - 1).
    The published code takes this variance of weights rounded to float16, in which it vanishes on
    long prompts; here it is float32.

    Args:
        weights: ``[B, H, w, K]`` attention weights of the window's queries; w is 2 or more.
        before: ``[B, K]`` bool, the keys before the window.

    Returns:
        ``[B]`` float64, 0 or above.

    Example:
        >>> weights = torch.tensor([[[[0.6, 0.4], [0.2, 0.8]]]])
        >>> round(shift(weights, torch.tensor([[True, False]])).item(), 4)
        0.08
    """
    variance = weights.var(dim=2, correction=1)
    return variance.masked_fill_(~before[:, None], 0.0).sum((1, 2), dtype=sum_dtype(weights))


def spread_and_change(layer: PromptLayer) -> tuple[Tensor, Tensor]:
    """Return a layer's :func:`dispersion` and :func:`shift`, ``[B]`` each."""
    return dispersion(layer.weights, layer.before), shift(layer.weights, layer.before)


def preference(spread: Tensor, change: Tensor, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """Combine dispersion and shift into a layer's claim on the cache.

    The claim is ``D^(1/tau1) V^(1/tau2)``.

    Args:
        spread: ``[B]`` the layer's :func:`dispersion`.
        change: ``[B]`` the layer's :func:`shift`.
        tau1, tau2: positive temperatures; large ones flatten the differences between layers.

    Returns:
        ``[B]``, 0 or above; only its share in the sum over layers has a meaning.

    Example:
        >>> preference(torch.tensor([4.0]), torch.tensor([9.0]), tau1=2.0, tau2=2.0)
        tensor([6.])
    """
    return spread ** (1.0 / tau1) * change ** (1.0 / tau2)


def keep_scores(
    weights: Tensor, before: Tensor, key_heads: int, *, gamma: float = 200.0, pool: int = 5
) -> Tensor:
    """Score each key before the window by mean and variance of the window's attention.

    ``mean_i p + gamma Var_i p`` (unbiased) for each query head, averaged over ``pool`` neighbouring
    keys with zeros beyond the edges (so the outermost keys get 3/5 and 4/5 of a plain mean), then
    over the query heads that share a key head.

    Args:
        weights: ``[B, H, w, K]`` attention weights of the window's queries; w is 2 or more where
            ``gamma`` is not 0.
        before: ``[B, K]`` bool, the keys before the window.
        key_heads: number of key heads, H_kv.
        gamma: weight of the variance.
        pool: odd width of the average; 1 for none.

    Returns:
        ``[B, H_kv, K]``, 0 or above; NaN for keys that are not before the window.

    Example:
        >>> weights = torch.tensor([[[[0.6, 0.1, 0.3], [0.6, 0.1, 0.3]]]])
        >>> keep_scores(weights, torch.tensor([[True, True, False]]), 1, pool=1)
        tensor([[[0.6000, 0.1000,    nan]]])
    """
    score = weights.mean(dim=2)
    if gamma:
        score = score + gamma * weights.var(dim=2, correction=1)
    score = over_groups(pooled(score.masked_fill(~before[:, None], 0.0), pool), key_heads)
    return score.masked_fill(~before[:, None], torch.nan)


def pooled(values: Tensor, width: int) -> Tensor:
    """Average over ``width`` neighbouring keys, with zeros beyond the edges.

    Args:
        values: ``[B, H, K]``.
        width: odd; 1 leaves the values as they are.

    Returns:
        ``[B, H, K]``.

    Example:
        >>> pooled(torch.tensor([[[3.0, 3.0, 3.0]]]), 3)
        tensor([[[2., 3., 2.]]])
    """
    if width == 1:
        return values
    smooth: Tensor = torch.nn.functional.avg_pool1d(values, width, stride=1, padding=width // 2)
    return smooth


def over_groups(values: Tensor, key_heads: int) -> Tensor:
    """Average over the query heads of each key head.

    Args:
        values: ``[B, H, K]``, one row per query head.
        key_heads: H_kv; query head h reads key head h // (H / H_kv).

    Returns:
        ``[B, H_kv, K]``.

    Example:
        >>> over_groups(torch.tensor([[[1.0], [3.0], [5.0], [7.0]]]), 2).flatten().tolist()
        [2.0, 6.0]
    """
    mean: Tensor = values.unflatten(1, (key_heads, -1)).mean(dim=2)
    return mean
