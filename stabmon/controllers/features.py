"""A number a key, carried into the scores by extra features of query and key, so that any attention kernel adds it by itself.

``z + bias`` is ``scale * [q, 1/scale].[k, bias]``. Where G query heads share a key head, the key carries G biases and each query
picks its own. B batch, H query heads, H_kv key heads, G = H / H_kv, Q queries, K keys, F extra features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = {"cpu": 1}
"""Extra features come in multiples of this; on every other kind of device of 8, which fused kernels ask for."""


def key_features(bias: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, H_kv, K, F]`` the biases ``[B, H, K]`` as features of keys."""
    features = bias.to(dtype).unflatten(1, (key_heads, -1)).transpose(-1, -2)
    return F.pad(features, (0, -features.shape[-1] % ALIGNMENT.get(bias.device.type, 8)))


def biases(features: Tensor, heads: int) -> Tensor:
    """``[B, H, K]`` what :func:`key_features` was given, with H ``heads``."""
    key_heads = features.shape[1]
    return features[..., : heads // key_heads].transpose(-1, -2).flatten(1, 2)


def with_query_features(query: Tensor, scale: float, key_heads: int, width: int) -> Tensor:
    """``[B, H, Q, D + F]`` for F ``width``: each query picks the bias of its own head."""
    heads = query.shape[1]
    group = heads // key_heads
    picks = F.one_hot(torch.arange(heads, device=query.device) % group, width).to(query.dtype) / scale
    return torch.cat((query, picks[None, :, None].expand(len(query), -1, query.shape[2], -1)), dim=-1)
