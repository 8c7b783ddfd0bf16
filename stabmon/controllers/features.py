"""Key biases as extra features of query and key, which any attention kernel adds.

``z + bias`` is ``scale * [q, 1/scale].[k, bias]``. Where G query heads share a key head, the key
carries G biases and each query picks its own. B batch, H query heads, H_kv key heads, G = H / H_kv,
Q queries, K keys, F extra features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = {"cpu": 4}
"""Multiple of the extra features: on CPU a register of float32, elsewhere 8.

Fused kernels need 8.
"""


def key_features(bias: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Return biases ``[B, H, K]`` as features of keys, ``[B, H_kv, K, F]``.

    Args:
        bias: one per query head and key.
        key_heads: H_kv.
        dtype: of the keys.
    """
    features = bias.to(dtype).unflatten(1, (key_heads, -1)).transpose(-1, -2)
    return F.pad(features, (0, -features.shape[-1] % ALIGNMENT.get(bias.device.type, 8)))


def biases(features: Tensor, heads: int) -> Tensor:
    """Return the biases ``[B, H, K]`` in :func:`key_features`, with H ``heads``."""
    key_heads = features.shape[1]
    return features[..., : heads // key_heads].transpose(-1, -2).flatten(1, 2)


def query_features(query: Tensor, scale: float, key_heads: int, width: int) -> Tensor:
    """Return features by which each query picks the bias of its own head.

    Args:
        query: ``[B, H, Q, D]``.
        scale: of the scores, by which the kernel multiplies the features too.
        key_heads: H_kv.
        width: F.

    Returns:
        ``[B, H, Q, F]``.
    """
    heads = query.shape[1]
    place = torch.arange(heads, device=query.device) % (heads // key_heads)
    picks = F.one_hot(place, width).to(query.dtype) / scale
    return picks[None, :, None].expand(len(query), -1, query.shape[2], -1)


class GainedQuery(torch.autograd.Function):
    """``[gain * query, features]``, keeping for backward only its own output.

    The attention kernel keeps that anyway.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, gain: Tensor, features: Tensor | None) -> Tensor:
        """Return the gained query with its features.

        Args:
            ctx: autograd's context.
            query: ``[B, H, Q, D]``.
            gain: ``[B, H, Q]``, nowhere 0.
            features: ``[B, H, Q, F]``, or None.

        Returns:
            ``[B, H, Q, D + F]``.
        """
        size = query.shape[-1]
        output = query.new_empty(
            *query.shape[:-1], size + (0 if features is None else features.shape[-1])
        )
        output[..., :size].copy_(query).mul_(gain[..., None])
        if features is not None:
            output[..., size:] = features
        ctx.save_for_backward(output, gain)
        ctx.size = size
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients; the query itself is ``output / gain``."""
        output, gain = ctx.saved_tensors
        gradient, gained = gradient[..., : ctx.size], output[..., : ctx.size]
        return gradient * gain[..., None], (gradient * gained).sum(-1) / gain, None


def changed_query(query: Tensor, gain: Tensor | None, features: Tensor | None) -> Tensor:
    """Return the query with its gain and features, if any, ``[B, H, Q, D + F]``.

    Args:
        query: ``[B, H, Q, D]``.
        gain: ``[B, H, Q]``, or None.
        features: ``[B, H, Q, F]``, or None.
    """
    if gain is not None:
        apply: Any = GainedQuery.apply
        output: Tensor = apply(query, gain.to(query.dtype), features)
        return output
    return query if features is None else torch.cat((query, features), dim=-1)
