"""Spread of a row's attention over its keys: B batch, H query heads, Q queries."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator
from stabmon.signals.base import signal


@signal(unit="nats", reduction="mean", needs=("entropy",))
def attention_entropy(attention: AttentionOperator) -> Tensor:
    r"""Compute the Shannon entropy of each attention row.

    :math:`H = -\sum_j p_j \ln p_j = L(1) - E_p[z]`.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``[0, ln n_visible]``; 0 for a row that sees nothing, NaN where the softmax
        is NaN. A learned sink counts as one more key.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.zeros(1, 1, 4, 8)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> attention_entropy(attention)
        tensor([[[0.0000, 0.6931, 1.0986, 1.3863]]])

    References:
        Zhai et al. 2023, arXiv:2303.06296, on the failures that come with low values.
    """
    return attention.entropy()


@signal(unit="share of ln n", reduction="mean", needs=("entropy",), least_visible=16)
def normalized_entropy(attention: AttentionOperator) -> Tensor:
    """Compute each row's entropy as a share of its maximum.

    The maximum is ``ln n`` of n visible keys.

    Values are comparable over sequence lengths and positions.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``[0, 1]``; 0 for a row that sees one key or none. A head's value leaves
        out rows that see fewer than 16 keys, whose entropy says little. Where no row of a call sees
        as many, as in short sequences and narrow windows, it leaves out those that see fewer than
        half of the most that one sees, and fewer than 2; it is NaN where no row sees 2.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.zeros(1, 1, 4, 8)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> normalized_entropy(attention)
        tensor([[[0., 1., 1., 1.]]])

    References:
        Zhai et al. 2023, arXiv:2303.06296; here normalised by each row's own visible keys.
    """
    options = attention.n_visible() + (attention.sinks is not None)
    entropy = attention.entropy()
    return torch.where(options > 1, entropy / options.clamp(min=2).to(entropy.dtype).log(), 0.0)


@signal(unit="probability", reduction="mean", needs=("collision",))
def collision_probability(attention: AttentionOperator) -> Tensor:
    r"""Compute the probability of drawing one key twice.

    :math:`\sum_j p_j^2 = \exp(L(2) - 2 L(1))`, the Rényi-2 form of entropy. Its inverse is the
    effective number of keys.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``[1 / n_visible, 1]``; 0 for a row that sees nothing, NaN where the
        softmax is NaN.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.zeros(1, 1, 4, 8)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> collision_probability(attention)
        tensor([[[1.0000, 0.5000, 0.3333, 0.2500]]])

    References:
        Rényi 1961, On measures of entropy and information.
    """
    return attention.collision()


@signal(unit="keys", reduction="mean", needs=("collision",))
def effective_keys(attention: AttentionOperator) -> Tensor:
    r"""Compute the effective number of keys of each row.

    :math:`1 / \sum_j p_j^2 = \exp(2 L(1) - L(2))`, the inverse participation ratio.

    Args:
        attention: the operator of one call.

    Returns:
        ``[B, H, Q]`` in ``[1, n_visible]``; 0 for a row that sees nothing, NaN where the softmax is
        NaN.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> query = torch.zeros(1, 1, 4, 8)
        >>> attention = attention_operator(query, query, scale=1.0, is_causal=True)
        >>> effective_keys(attention)
        tensor([[[1., 2., 3., 4.]]])

    References:
        The inverse of :func:`collision_probability`.
    """
    return torch.where(attention.occupied, 1 / attention.collision(), 0.0)
