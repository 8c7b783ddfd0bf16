"""Models of the testbed: a hand-written byte-level GPT, and transformers' own.

Llama and GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpt
import torch
import torch.nn.functional as F
from testbed.recipes import Shape
from torch import Tensor, nn

from stabmon.tiny.corpus import VOCABULARY

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Attention(nn.Module):
    """Causal self-attention ``[B, S, width] -> [B, S, width]``.

    Fused, or by hand with scores in a low precision.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.head_dim = shape.width // shape.heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(shape.width, shape.width, bias=shape.bias)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * self.head_dim, bias=shape.bias)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * self.head_dim, bias=shape.bias)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if self.shape.position == "rotary":
            query, key = gpt.rotate(query), gpt.rotate(key)
        groups = self.shape.heads // self.shape.kv_heads
        mask = (
            None
            if self.shape.window is None
            else window_mask(x.shape[1], self.shape.window, x.device)
        )
        if self.shape.scores == "fused":
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scaling,
                enable_gqa=groups > 1,
            )
        else:
            low = PRECISIONS.get(self.shape.scores, torch.float32)
            mask = window_mask(x.shape[1], x.shape[1], x.device) if mask is None else mask
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scores = query.to(low) @ key.to(low).transpose(-2, -1) * self.scaling
            weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
            mixed = weights.to(value.dtype) @ value
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class GPT(gpt.GPT):
    """The GPT of ``train/gpt.py`` with this attention, and optional learned positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(gpt.GPTShape(shape.layers, shape.heads, shape.width))
        for block in self.blocks:
            block.attention = Attention(shape)
        self.positions = (
            nn.Embedding(shape.length, shape.width) if shape.position == "learned" else None
        )
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        return x if self.positions is None else x + self.positions.weight[: tokens.shape[1]]


def build(shape: Shape) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Build the model and its logits ``[B, S, 256]`` as a function of bytes."""
    if shape.family == "own":
        own = GPT(shape)
        return own, own
    model = _of_transformers(shape)
    if shape.qk_norm:
        model.set_attn_implementation(_normalised_sdpa())
    return model, lambda tokens: model(tokens).logits


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each attention layer, in order."""
    for name, module in model.named_modules():
        if hasattr(module, "q_proj") or hasattr(module, "c_attn"):
            yield name, module


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return the visible keys of each query, ``[S, S]`` bool."""
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)


def _of_transformers(shape: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if shape.family == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_embd": shape.width,
            "n_positions": shape.length,
        }
        return GPT2LMHeadModel(GPT2Config(**size, **drop, **ends))
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.length,
            tie_word_embeddings=True,
            pad_token_id=None,
            **ends,
        )
    )


def _normalised_sdpa() -> str:
    """Register attention with normalised queries and keys; return its name.

    Scores cannot grow with the weights.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def normalised(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        size = query.shape[-1:]
        return sdpa_attention_forward(
            module, F.rms_norm(query, size), F.rms_norm(key, size), value, *args, **kwargs
        )

    AttentionInterface.register("normalised_sdpa", normalised)
    AttentionMaskInterface.register("normalised_sdpa", sdpa_mask)
    return "normalised_sdpa"
