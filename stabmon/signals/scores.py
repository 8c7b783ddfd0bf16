"""Size of scores and the bits they need: B batch, H query heads, Q queries."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon._torch.number_formats import SCORE_ERROR
from stabmon.operator import AttentionOperator
from stabmon.signals.base import signal


@signal(unit="score", reduction="max", needs=("max_score",))
def max_logit(attention: AttentionOperator) -> Tensor:
    """Compute each row's largest score before any softcap.

    Its growth precedes most attention failures.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]``; -inf for a row that sees nothing, NaN where a score is NaN. A learned sink is
        no score.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> max_logit(attention)
        tensor([[[4., 4.]]])

    References:
        Wortsman et al. 2023, arXiv:2309.14322; Kimi K2, arXiv:2507.20534.
    """
    return attention.max_score()


@signal(unit="probability", reduction="mean", needs=("log_odds_of_rest",))
def max_probability(attention: AttentionOperator) -> Tensor:
    """Compute each row's largest probability.

    It is ``m = exp(S - L(1))``, of the row's largest score S.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``(0, 1]``; 0 for a row that sees nothing, NaN where the softmax is NaN.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> max_probability(attention)
        tensor([[[1.0000, 0.5000]]])

    References:
        The softmax at its maximum.
    """
    return torch.where(attention.occupied, (-attention.log_odds_of_rest()).sigmoid(), 0.0)


@signal(unit="probability", reduction="mean", needs=("first_key_mass",))
def sink_mass(attention: AttentionOperator) -> Tensor:
    """Compute each row's probability on the first key.

    Above 0.3 on average that key is an attention sink, which is no failure.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``[0, 1]``; 0 for a row that does not see that key.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> sink_mass(attention)
        tensor([[[1.0000, 0.5000]]])

    References:
        Gu et al. 2024, arXiv:2410.10781; Barbero et al. 2025, arXiv:2504.02732.
    """
    return attention.first_key_mass()


@signal(unit="bits", reduction="max", needs=("max_logit", "min_logit"))
def precision_bits(attention: AttentionOperator) -> Tensor:
    """Compute the mantissa bits that each row needs.

    With them rounding moves the softmax by at most 0.1.

    Rounding to ``b`` bits moves a logit by up to ``max|z| * 2**-b``, and a shift of logits by at
    most eta moves the softmax by at most ``tanh(eta / 2)`` in total variation. Compare with 8
    (bfloat16), 11 (float16) and 24 (float32).

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]``, ``log2(max|z| / (2 artanh 0.1))``: negative for small logits, -inf where all
        are 0 or nothing is visible.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> precision_bits(attention)
        tensor([[[4.3171, 4.3171]]])

    References:
        The sharp form of the precision bound of the HNF programme; replaces log2(kappa D^2 / eps),
        which no input can meet.
    """
    return (largest_magnitude(attention) / SCORE_ERROR).log2()


@signal(unit="share of exp's range", reduction="max", needs=())
def exp_range(attention: AttentionOperator) -> Tensor:
    r"""Compute the share of the range of exp in each row.

    Of attention that forms :math:`e^{z_j} / \sum_k e^{z_k}` by itself and does not subtract the
    row's maximum: it overflows at 88.7 in float32 and bfloat16, at 11.1 in float16, and the row is
    NaN. Measured where attention does so, whether or not the signal is named in the settings.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]``, the largest of :math:`z / \ln f_\max` and :math:`|L(1)| / |\ln f|` with
        f_max and f the end of the format on the side of L(1); 1 is overflow, or a sum of 0. 0 for a
        softmax, which subtracts the maximum, and NaN where a score is.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.ones(1, 1, 2, 4)
        >>> exp_range(attention_operator(query, query, scale=1.0))
        tensor([[[0., 0.]]])

    References:
        IEEE 754 on the ends of the formats.
    """
    if attention.exp_range is None:
        return torch.zeros_like(attention.occupied, dtype=torch.float32)
    return attention.exp_range


def largest_magnitude(attention: AttentionOperator) -> Tensor:
    """Compute max|z| over the visible keys of each row; 0 where there are none."""
    largest = torch.maximum(attention.max_logit(), -attention.min_logit())
    return torch.where(attention.occupied, largest, 0.0)
