"""How large scores are and how many bits they need: B batch, H query heads, Q queries."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon._torch.number_formats import SCORE_ERROR
from stabmon.operator import AttentionOperator
from stabmon.signals.base import signal


@signal(unit="score", reduction="max", needs=("max_score",))
def max_logit(attention: AttentionOperator) -> Tensor:
    """Largest score of each row, before any softcap: the number whose growth precedes most
    attention failures.

    Returns:
        ``[B, H, Q]``; -inf for a row that sees nothing, NaN where a score is NaN. A learned sink is
        no score.

    Source:
        Wortsman et al. 2023, arXiv:2309.14322; Kimi K2, arXiv:2507.20534.
    """
    return attention.max_score()


@signal(unit="probability", reduction="mean", needs=("log_odds_of_rest",))
def max_probability(attention: AttentionOperator) -> Tensor:
    """Probability of each row's most attended key, m = exp(S - L(1)).

    Returns:
        ``[B, H, Q]`` in ``(0, 1]``; 0 for a row that sees nothing, NaN where the softmax is NaN.

    Source:
        The softmax at its maximum.
    """
    return torch.where(attention.occupied, (-attention.log_odds_of_rest()).sigmoid(), 0.0)


@signal(unit="probability", reduction="mean", needs=("first_key_mass",))
def sink_mass(attention: AttentionOperator) -> Tensor:
    """Probability that each row puts on the first key of its sequence.

    Returns:
        ``[B, H, Q]`` in ``[0, 1]``; 0 for a row that does not see that key. Above 0.3 on average it
        is an attention sink, which is no pathology.

    Source:
        Gu et al. 2024, arXiv:2410.10781; Barbero et al. 2025, arXiv:2504.02732.
    """
    return attention.first_key_mass()


@signal(unit="bits", reduction="max", needs=("max_logit", "min_logit"))
def precision_bits(attention: AttentionOperator) -> Tensor:
    """Mantissa bits that a number format needs to hold a row's logits, so that rounding moves its
    softmax by at most 0.1.

    Rounding to ``b`` bits moves a logit by up to ``max|z| * 2**-b``, and a shift of logits by at
    most eta moves the softmax by at most ``tanh(eta / 2)`` in total variation. Compare with 8
    (bfloat16), 11 (float16) and 24 (float32).

    Returns:
        ``[B, H, Q]``, ``log2(max|z| / (2 artanh 0.1))``: negative for small logits, -inf where all
        are 0 or nothing is visible.

    Source:
        The sharp form of the precision bound of the HNF programme; replaces log2(kappa D^2 / eps),
        which no input can meet.
    """
    return (_largest_magnitude(attention) / SCORE_ERROR).log2()


def _largest_magnitude(attention: AttentionOperator) -> Tensor:
    """max|z| over the visible keys of each row; 0 where there are none."""
    largest = torch.maximum(attention.max_logit(), -attention.min_logit())
    return torch.where(attention.occupied, largest, 0.0)
