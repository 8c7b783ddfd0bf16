"""Small models, healthy or broken in one way each, for a check to tell apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

WIDTH, VOCABULARY, LENGTH = 128, 256, 64


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def gpt2(attention: str = "sdpa", **changes: Any) -> Any:
    sizes = {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "loss_type": "ForCausalLM"}
    config = GPT2Config(**(sizes | tokens | changes))
    return seeded(lambda: GPT2LMHeadModel._from_config(config, attn_implementation=attention))


def llama(**changes: Any) -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    more = {
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "use_cache": False,
    }
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**(sizes | more | changes))))


def qwen3(**changes: Any) -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    more = {
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "use_cache": False,
    }
    return seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**(sizes | more | changes))))


def bert() -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return seeded(
        lambda: BertForMaskedLM(
            BertConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes)
        )
    )


def vit() -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return seeded(
        lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **sizes))
    )


def tokens(length: int = LENGTH, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


class HandWritten(nn.Module):
    """One block of attention over normalised inputs with a scalar loss.

    With nn.Linear's own initialisation.

    Args:
        scale: factor of the scores; None for 1 / sqrt(D).
        where: ``kernel`` passes it to the fused kernel, ``query`` multiplies queries before the
            product, ``scores`` the product.
        gain: factor of the projections' inputs.
    """

    def __init__(
        self,
        *,
        scale: float | None = None,
        where: str = "kernel",
        heads: int = 2,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.where, self.gain = heads, where, gain
        self.scale = (WIDTH // heads) ** -0.5 if scale is None else scale
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (WIDTH,)) * self.gain
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if self.where == "kernel":
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            scores = (q * self.scale) @ k.mT if self.where == "query" else q @ k.mT * self.scale
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(-2)).square().mean()


def hand_written(**changes: Any) -> HandWritten:
    model: HandWritten = seeded(lambda: HandWritten(**changes))
    return model


def noise(length: int = 256) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))


def narrow() -> Any:
    """Make a model with 64 heads of two dimensions."""
    return gpt2(n_head=64)


def with_sample() -> tuple[HandWritten, Tensor]:
    """Make a model and a sample, as a callable on the command line may return."""
    return hand_written(), noise(48)


def tiny() -> Any:
    """Make a model for a sweep in seconds."""
    return gpt2(
        n_embd=32,
        n_head=1,
        n_layer=1,
        n_positions=16,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )


def fails() -> nn.Module:
    """Raise something other than a TypeError."""
    raise RuntimeError("no weights\nunder this name")


def leaves() -> nn.Module:
    """Leave the process, as a script without arguments does."""
    print("usage: me")
    raise SystemExit(3)


class Speechless(Exception):
    """An error without words."""

    def __str__(self) -> str:
        raise ValueError("no words either")


def speechless() -> nn.Module:
    """Raise an error whose message cannot be made."""
    raise Speechless


class Broken(nn.Module):
    """Fail in the forward."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        raise ZeroDivisionError("not today")
