"""GPT-2 and Llama models from their configurations, in any size."""

from __future__ import annotations

from typing import Any

import torch
from gpu_checks.harness import Place
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}


def gpt2(
    place: Place,
    width: int = 256,
    layers: int = 3,
    length: int = 128,
    vocabulary: int = 512,
    dropout: float = 0.1,
    attention: str = "sdpa",
) -> Any:
    """GPT-2 with heads of dimension 64, in training mode on the device."""
    torch.manual_seed(0)
    sizes = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": width // 64,
        "n_positions": length,
        "vocab_size": vocabulary,
    }
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = GPT2Config(
        **sizes, **drops, **ENDS, loss_type="ForCausalLMLoss", attn_implementation=attention
    )
    with place.device:
        return GPT2LMHeadModel(config).train()


def llama(
    place: Place,
    width: int = 256,
    layers: int = 3,
    length: int = 128,
    vocabulary: int = 512,
    dropout: float = 0.0,
    attention: str = "sdpa",
) -> Any:
    """Llama with grouped heads of dimension 64, in training mode on the device."""
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4 if heads >= 8 else heads // 2),
        vocab_size=vocabulary,
        max_position_embeddings=length,
        attention_dropout=dropout,
        attn_implementation=attention,
        **ENDS,
    )
    with place.device:
        return LlamaForCausalLM(config).train()


FAMILIES = {"gpt2": gpt2, "llama": llama}


def tokens(
    place: Place, batch: int, length: int, vocabulary: int = 512, seed: int = 1
) -> torch.Tensor:
    """``[batch, length]`` random tokens on the device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator).to(place.device)
