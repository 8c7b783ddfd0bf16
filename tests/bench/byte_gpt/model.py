"""A GPT over bytes, with attention as people write it."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.byte_gpt.recipe import Recipe

BYTES = 256
BY_HAND = ("exp_float32", "exp_float16", "float16_scores", "bfloat16_scores")
"""Precisions for which scores are formed by hand; others use the fused kernel."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return normed


@cache
def _angles(length: int, width: int) -> tuple[Tensor, Tensor]:
    turns = 1000.0 ** (-torch.arange(width // 2) / (width // 2))
    angle = torch.arange(length)[:, None] * turns[None]
    return angle.cos(), angle.sin()


def rotated(x: Tensor) -> Tensor:
    """Return ``[..., S, D]`` with rotary positions."""
    cos, sin = (each.to(x.dtype) for each in _angles(*x.shape[-2:]))
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """Causal self-attention, fused or by hand as the recipe's precision asks."""

    mask: Tensor
    bias: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, width = recipe, recipe.width
        self.heads, self.head_dim = recipe.heads, width // recipe.heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        if recipe.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        step = torch.arange(recipe.length)
        back = step[:, None] - step[None, :]
        visible = back >= 0
        if recipe.window:
            visible &= back < recipe.window
        self.register_buffer("mask", visible, persistent=False)
        bias = torch.zeros(self.heads, recipe.length, recipe.length)
        if recipe.position == "alibi":
            slopes = [2 ** (-8 * (head + 1) / self.heads) for head in range(self.heads)]
            slope = torch.tensor(slopes) * recipe.alibi
            bias = -slope[:, None, None] * back.clamp(min=0).float()
        bias[0, :, 0] += recipe.sink
        self.register_buffer("bias", bias, persistent=False)
        self.scale_factor = 1.0
        """Factor of the scale, which a ramp changes."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, self.head_dim)
        q, k, v = (each(x).view(shape).transpose(1, 2) for each in (self.q, self.k, self.v))
        if self.recipe.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.recipe.position == "rotary":
            q, k = rotated(q), rotated(k)
        scale = self.recipe.scale * self.scale_factor / math.sqrt(self.head_dim)
        by_hand = self.recipe.precision in BY_HAND
        y = self._by_hand(q, k, v, scale) if by_hand else self._fused(q, k, v, scale)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, width))
        return out

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length = q.shape[-2]
        visible, mask = self.mask[:length, :length], None
        if self.recipe.position == "alibi" or self.recipe.sink:
            bias = self.bias[:, :length, :length]
            mask = bias.masked_fill(~visible, -math.inf)[None].to(q.dtype)
        elif self.recipe.window:
            mask = visible
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )

    def _by_hand(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        visible, precision = self.mask[: q.shape[-2], : q.shape[-2]], self.recipe.precision
        k = k.transpose(-1, -2)
        if precision == "float16_scores":
            scores = (q.half() @ k.half()).float() * scale
        elif precision == "bfloat16_scores":
            scores = ((q * scale).bfloat16() @ k.bfloat16()).float()
        else:
            scores = (q * scale) @ k
        if precision.startswith("exp"):
            scores = scores.masked_fill(~visible, -1e4)
            scores = scores.half() if precision == "exp_float16" else scores
            weights = torch.exp(scores) * visible
            weights = (weights / weights.sum(-1, keepdim=True)).float()
        else:
            weights = torch.softmax(scores.masked_fill(~visible, -math.inf), -1)
        return weights.to(v.dtype) @ v


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream, or normalised after it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, width = recipe, recipe.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(recipe)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe.post_norm:
            x = self.norm1(x + self.attn(x))
            normed: Tensor = self.norm2(x + self._mlp(x))
            return normed
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self._mlp(self.norm2(x))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        if self.recipe.precision == "float16_mlp":
            hidden = hidden.half().float()
        out: Tensor = self.down(hidden)
        return out


class ByteGPT(nn.Module):
    """The model of a recipe, initialised from a seed.

    Matrices that read the residual stream have a standard deviation of 1 / sqrt(inputs), so that
    scores are of order 1; those that write to it 1 / sqrt(2 x layers) of that.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = recipe.width
        self.emb = nn.Embedding(BYTES, width)
        self.pos = nn.Embedding(recipe.length, width) if recipe.position == "learned" else None
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0, _deviation(name, parameter, recipe))
                if name.endswith(("q.weight", "k.weight")):
                    parameter.data.mul_(recipe.query_key_init)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of predicting ``targets``, both ``[B, S]``."""
        x = self.emb(tokens)
        if self.pos is not None:
            x = x + self.pos.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.view(-1, BYTES), targets.reshape(-1))


def _deviation(name: str, parameter: nn.Parameter, recipe: Recipe) -> float:
    if name.endswith(("q.weight", "k.weight", "v.weight", "up.weight")):
        return 1 / math.sqrt(recipe.width)
    if name.endswith(("o.weight", "down.weight")):
        return 1 / math.sqrt(parameter.shape[1]) / math.sqrt(2 * recipe.layers)
    return 0.02


def group_of(name: str) -> str:
    """Return the parameter group of a parameter, by its name."""
    if ".attn.q" in name or ".attn.k" in name:
        return "query_key"
    if ".attn." in name:
        return "value_output"
    if ".up." in name or ".down." in name:
        return "mlp"
    if name.startswith(("emb", "pos")):
        return "embedding"
    return "head" if name.startswith("head") else "norm"
