"""How widely a head looks: B batch, H query heads, Q queries."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator
from stabmon.signals.base import signal


@signal(unit="nats", reduction="mean", needs=("entropy",))
def attention_entropy(attention: AttentionOperator) -> Tensor:
    r"""Shannon entropy of each attention row, :math:`-\sum_j p_j \ln p_j`, without forming the row.

    Returns:
        ``[B, H, Q]`` in ``[0, ln n_visible]``; 0 for a row that sees nothing, NaN where the softmax
        is NaN. A learned sink counts as one more key.

    Source:
        H = L(1) - E_p[z]; Zhai et al. 2023, arXiv:2303.06296, on what low values accompany.
    """
    return attention.entropy()


@signal(unit="share of ln n", reduction="mean", needs=("entropy",), least_visible=16)
def normalized_entropy(attention: AttentionOperator) -> Tensor:
    """Entropy of each row as a share of the largest it could have, ln n_visible: comparable over
    lengths and positions.

    Returns:
        ``[B, H, Q]`` in ``[0, 1]``; 0 for a row that sees one key or none. A head's value leaves
        out rows that see fewer than 16 keys, whose entropy says little; it is NaN where no row sees
        as many.

    Source:
        Zhai et al. 2023, arXiv:2303.06296, normalised by each row's own visible keys.
    """
    options = attention.n_visible() + (attention.sinks is not None)
    entropy = attention.entropy()
    return torch.where(options > 1, entropy / options.clamp(min=2).to(entropy.dtype).log(), 0.0)


@signal(unit="probability", reduction="mean", needs=("collision",))
def collision_probability(attention: AttentionOperator) -> Tensor:
    r"""Chance that two draws from a row hit the same key, :math:`\sum_j p_j^2`; its inverse is the
    effective number of keys.

    Returns:
        ``[B, H, Q]`` in ``[1 / n_visible, 1]``; 0 for a row that sees nothing, NaN where the
        softmax is NaN.

    Source:
        exp(L(2) - 2 L(1)), the Renyi-2 form of entropy.
    """
    return attention.collision()


@signal(unit="keys", reduction="mean", needs=("collision",))
def effective_keys(attention: AttentionOperator) -> Tensor:
    r"""How many keys a row in effect looks at, :math:`1 / \sum_j p_j^2`.

    Returns:
        ``[B, H, Q]`` in ``[1, n_visible]``; 0 for a row that sees nothing, NaN where the softmax is
        NaN.

    Source:
        exp(2 L(1) - L(2)), the inverse participation ratio.
    """
    return torch.where(attention.occupied, 1 / attention.collision(), 0.0)
