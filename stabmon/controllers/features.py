"""A number a key, carried into the scores by extra features of query and key, so that any attention
kernel adds it by itself.

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
"""Extra features come in multiples of this: on CPU a register of float32, elsewhere 8, which fused
kernels ask for.
"""


def key_features(bias: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, H_kv, K, F]`` the biases ``[B, H, K]`` as features of keys."""
    features = bias.to(dtype).unflatten(1, (key_heads, -1)).transpose(-1, -2)
    return F.pad(features, (0, -features.shape[-1] % ALIGNMENT.get(bias.device.type, 8)))


def biases(features: Tensor, heads: int) -> Tensor:
    """``[B, H, K]`` what :func:`key_features` was given, with H ``heads``."""
    key_heads = features.shape[1]
    return features[..., : heads // key_heads].transpose(-1, -2).flatten(1, 2)


def query_features(query: Tensor, scale: float, key_heads: int, width: int) -> Tensor:
    """``[B, H, Q, F]`` for F ``width``: by its features each query picks the bias of its own
    head.
    """
    heads = query.shape[1]
    picks = (
        F.one_hot(torch.arange(heads, device=query.device) % (heads // key_heads), width).to(
            query.dtype
        )
        / scale
    )
    return picks[None, :, None].expand(len(query), -1, query.shape[2], -1)


class GainedQuery(torch.autograd.Function):
    """``[gain * query, features]``, which keeps for backward nothing but its own output: that the
    attention kernel keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, gain: Tensor, features: Tensor | None) -> Tensor:
        """``query`` ``[B, H, Q, D]``, ``gain`` ``[B, H, Q]`` nowhere 0, ``features`` ``[B, H, Q,
        F]`` -> ``[B, H, Q, D + F]``.
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
        """The query itself is ``output / gain``."""
        output, gain = ctx.saved_tensors
        gradient, gained = gradient[..., : ctx.size], output[..., : ctx.size]
        return gradient * gain[..., None], (gradient * gained).sum(-1) / gain, None


def changed_query(query: Tensor, gain: Tensor | None, features: Tensor | None) -> Tensor:
    """``[B, H, Q, D + F]`` the query with its gain and its features, where there are any."""
    if gain is not None:
        output: Tensor = GainedQuery.apply(query, gain.to(query.dtype), features)  # type: ignore[no-untyped-call]
        return output
    return query if features is None else torch.cat((query, features), dim=-1)
