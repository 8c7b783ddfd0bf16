"""A causal model with written-out attention, as nanoGPT without flash.

Matmul, mask, softmax, dropout, matmul.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from references.case import Batch, Call, Case, liven, spread_heads, tokens
from references.formulas import Attention, dot, project, visible
from torch import Tensor, nn

VOCABULARY, LAYERS, HEADS, WIDTH, LENGTH = 96, 2, 4, 64, 48


class ManualAttention(nn.Module):
    """Attention with the output and the weights before dropout as results."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("past", torch.ones(LENGTH, LENGTH).tril().bool())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(x).split(WIDTH, dim=2)
        )
        past: Any = self.past
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = torch.softmax(scores.masked_fill(~past[:length, :length], float("-inf")), dim=-1)
        mixed = (self.dropout(weights) @ v).transpose(1, 2).reshape(batch, length, WIDTH)
        return self.out(mixed), weights


class ManualGPT(nn.Module):
    """Embeddings, pre-norm blocks of attention and MLP, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.attentions = nn.ModuleList(ManualAttention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x))[0]
            x = x + mlp(x)
        logits: Tensor = self.head(x)
        return logits


def build_manual(implementation: str) -> tuple[nn.Module, Batch]:
    """Build the model above with its heads spread."""
    model = ManualGPT()
    liven(model)
    for module in model.modules():
        if isinstance(module, ManualAttention):
            nn.init.normal_(module.qkv.weight, std=0.125)
            spread_heads(module.qkv.weight[:WIDTH], HEADS, 0.1, 6)
    return model, {"input_ids": tokens(2, LENGTH, VOCABULARY)}


def attend_manual(call: Call, batch: Batch) -> Attention:
    """Attend: q and k are the first two thirds of one fused projection."""
    hidden, fused = call.inputs["x"], call.module.qkv
    q_weight, k_weight, _ = fused.weight.chunk(3)
    q_bias, k_bias, _ = fused.bias.chunk(3)
    query, key = project(hidden, q_weight, q_bias, HEADS), project(hidden, k_weight, k_bias, HEADS)
    seen = visible(torch.ones(hidden.shape[:2], dtype=torch.bool), hidden.shape[1], causal=True)
    return Attention(dot(query, key, (WIDTH // HEADS) ** -0.5), seen)


CASES = (
    Case(
        "hand-written softmax, training",
        build_manual,
        ManualAttention,
        attend_manual,
        LAYERS,
        ("manual",),
        training=True,
    ),
)
