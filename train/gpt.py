"""A small GPT as people write it by hand.

One fused projection, rotary positions, scaled_dot_product_attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon._settings import Count
from stabmon.tiny.corpus import VOCABULARY
from stabmon.tiny.language_models import ShapeError


@dataclass(frozen=True)
class GPTShape:
    """Size of a GPT. B batch, S tokens, H heads, D = width / heads."""

    layers: Count = 4
    heads: Count = 4
    width: Count = 128
    qk_norm: bool = False
    """RMS-normalise queries and keys per head: scores cannot grow with the weights."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ShapeError(
                f"width {self.width} must be a multiple of twice the {self.heads} heads: use "
                f"{2 * self.heads * max(1, self.width // (2 * self.heads))}"
            )


class Attention(nn.Module):
    """Causal self-attention, ``[B, S, width] -> [B, S, width]``."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        head = shape.width // shape.heads
        self.q_norm = nn.RMSNorm(head) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        query, key = rotate(self.q_norm(query)), rotate(self.k_norm(key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """Attention and an MLP with a GELU, each behind a norm and a residual."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    """Bytes ``[B, S]`` -> logits of the next byte ``[B, S, 256]``.

    The embedding is also the last layer.
    """

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input of the first block, ``[B, S, width]``."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next byte in nats over ``[B, S]``."""
        return F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to ``[B, H, S, D]``.

    Each pair of features is turned by its position (Su et al. 2021, arXiv:2104.09864).
    """
    length, size = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = torch.arange(length, device=x.device)[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
