"""Curvature and gradient flow of the softmax: B batch, H query heads, Q queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from stabmon.operator import AttentionOperator
from stabmon.signals.base import signal
from stabmon.signals.scores import largest_magnitude

_SQUARINGS = 4
"""Powers of the keys' Gram matrix up to the 16th."""
_SATURATED = 1e-3
"""A row whose softmax passes less than this share of a gradient is saturated."""


@signal(unit="norm", reduction="max", needs=("jacobian_norm",))
def softmax_jacobian_norm(attention: AttentionOperator) -> Tensor:
    r"""Compute the norm of each row's softmax Jacobian.

    :math:`\|\mathrm{diag}(p) - p p^\top\|_F`, whose square is
    :math:`\sum p^2 - 2 \sum p^3 + (\sum p^2)^2`.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``[0, 1/sqrt 2]``, 0 for a one-hot row (no gradient passes) and for a row
        that sees nothing; NaN where the softmax is NaN. With a learned sink, the Jacobian of the
        softmax over keys and sink.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> softmax_jacobian_norm(attention).round(decimals=4)
        tensor([[[0.0000, 0.5000]]])

    References:
        The Jacobian of the softmax, expanded.
    """
    return attention.jacobian_norm()


@signal(unit="ln curvature", reduction="max", needs=("log_odds_of_rest",))
def hnf_log_curvature(attention: AttentionOperator) -> Tensor:
    r"""Bound each row's log curvature in query and keys.

    :math:`\kappa \le \lambda [\beta^2 (\|q\|^2 + \|K\|_2^2) / \sqrt 2 + \beta / 2]` with
    :math:`\lambda \le \min(m, 2m(1-m))`, the largest eigenvalue of the Jacobian, in log form, so
    that saturated rows keep their digits. It rises with the scores and falls again once the row
    saturates.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]``; -inf for a row that sees one key or none. ``||K||_2`` enters by an upper
        bound (the Schatten-32 norm) that is at most 14% above it at D = 64. NaN for scores that
        came without query and key.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> hnf_log_curvature(attention)
        tensor([[[  -inf, 1.5024]]])

    References:
        The curvature invariant kappa_f = |D^2 f| / 2 of the HNF programme, bounded jointly in query
        and keys.
    """
    if attention.given_scores is not None:
        return torch.full_like(attention.log_odds_of_rest(), math.nan)
    beta = abs(attention.scale)
    k_squared = _largest_eigenvalue(attention.key_gram).repeat_interleave(
        attention.heads // attention.key_heads, dim=1
    )
    size = beta**2 * (attention.query_squared + k_squared[..., None]) / math.sqrt(2) + beta / 2
    return _log_jacobian_eigenvalue(attention) + size.log()


@signal(unit="ln curvature", reduction="max", needs=("max_logit", "min_logit"))
def hnf_log_curvature_bound(attention: AttentionOperator) -> Tensor:
    """Compute the classic, looser bound on log curvature.

    It is ``ln|Q| + ln|K| - ln D + 2 max|z|``, of D key dimensions and scores z.

    It orders heads by max|z|, and in log form it cannot overflow. Norms are Frobenius norms over
    the head's queries and keys of the batch element, padding left out. Never compare its
    exponential with a constant.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]``, with the row's own max|z|; NaN for scores that came without query and key.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> hnf_log_curvature_bound(attention)
        tensor([[[8.6931, 8.6931]]])

    References:
        The transformer bound of the HNF programme; see :func:`hnf_log_curvature` for the tight one.
    """
    largest = largest_magnitude(attention)
    if attention.given_scores is not None:
        return torch.full_like(largest, math.nan)
    key_squared = attention.key_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    key_squared = key_squared.repeat_interleave(attention.heads // attention.key_heads, dim=1)
    query_squared = attention.query_squared.masked_fill(~attention.is_counted, 0.0).sum(-1)
    log_norms = (query_squared.log() + key_squared.log()) / 2 - math.log(attention.head_dim)
    return log_norms[..., None] + 2 * largest


@signal(unit="share of rows", reduction="mean", needs=("log_odds_of_rest",), least_visible=2)
def saturated_fraction(attention: AttentionOperator) -> Tensor:
    """Mark rows whose softmax passes hardly any gradient.

    1 where the norm of the Jacobian must be below 1e-3: ``|dL/dz| <= lambda |dL/dp|`` with
    ``lambda <= 2m(1 - m)``.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` of 0 and 1; the mean over rows is the share of a head's rows that no longer
        learn from their scores.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> saturated_fraction(attention)
        tensor([[[1., 0.]]])

    References:
        The largest eigenvalue of the softmax's Jacobian, bounded by its largest probability.
    """
    return (_log_jacobian_eigenvalue(attention) < math.log(_SATURATED)).to(
        attention.log_odds_of_rest().dtype
    )


def _log_jacobian_eigenvalue(attention: AttentionOperator) -> Tensor:
    """Bound ln lambda_max(diag(p) - p p^T) from above, with r = (1 - m) / m.

    In float32 it holds down to ln r = -100.
    """
    log_r = attention.log_odds_of_rest()
    return torch.minimum(-softplus(log_r), math.log(2) + log_r - 2 * softplus(log_r))


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Bound each Gram matrix's largest eigenvalue by (tr G^16)^(1/16)."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(gram.dtype).tiny)
    # the largest eigenvalue is within sqrt D of the unit, so that no power overflows
    unit = trace / math.sqrt(gram.shape[-1])
    power = gram / unit[..., None, None]
    for _ in range(_SQUARINGS - 1):
        power = power @ power
    trace_of_power = (power * power).sum(dim=(-2, -1))
    largest: Tensor = unit * trace_of_power ** (1 / 2**_SQUARINGS)
    return largest
