"""Small decoders from configs, and the oracle of a compressed cache: a full forward in which
evicted keys are at -inf.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stabmon.analysis.kv_cache import CompressedCache
from stabmon.capture.intercept import AttentionSite, intercepted

VOCABULARY = 48
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def sharpened(model: Any) -> Any:
    """Widen the query and key weights, each layer's more, so that eviction shows and CAKE gives
    layers other budgets.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "c_attn.weight" in name:
                parameter.mul_(4.0 * (1 + int(re.findall(r"\d+", name)[0])))
    return model.eval()


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return sharpened(LlamaForCausalLM(LlamaConfig(**(SIZES | TOKENS | changes))))


def qwen3(**changes: Any) -> Any:
    torch.manual_seed(1)
    return sharpened(Qwen3ForCausalLM(Qwen3Config(**(SIZES | TOKENS | changes))))


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(2)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return sharpened(GPT2LMHeadModel(GPT2Config(**(sizes | TOKENS | changes))))


def gemma3(**changes: Any) -> Any:
    """Four layers, of which the second and the fourth attend to all."""
    torch.manual_seed(3)
    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8}
    return sharpened(Gemma3ForCausalLM(Gemma3TextConfig(**(SIZES | TOKENS | more | changes))))


MAKERS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(
        1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def masked_forward(
    model: Any,
    ids: Tensor,
    kept: dict[str, Tensor],
    prompt: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits ``[B, S + T, V]`` of one full forward; queries from ``prompt`` on see none of the
    prompt's keys that are not kept.
    """
    batch, length = ids.shape
    valid = torch.ones_like(ids) if attention_mask is None else attention_mask
    place = torch.arange(length)

    def around(site: AttentionSite) -> Any:
        if site.layer not in kept:
            return site.run()
        held = kept[site.layer]
        visible = (place[None, :] <= place[:, None]) & valid[:, None, None].bool()
        visible = visible.expand(batch, held.shape[1], -1, -1).clone()
        for sample in range(batch):
            for head in range(held.shape[1]):
                gone = set(range(prompt)) - set(held[sample, head].tolist())
                visible[sample, head, prompt:, sorted(gone)] = False
        groups = site.arguments["query"].shape[1] // held.shape[1]
        bias = torch.zeros(visible.shape, dtype=ids_dtype(site)).masked_fill(~visible, -torch.inf)
        bias[..., torch.arange(length), torch.arange(length)] = (
            0.0  # padding sees itself, or its row would be NaN
        )
        return site.run(attention_mask=bias.repeat_interleave(groups, dim=1))

    positions = (valid.cumsum(1) - 1).clamp(min=0)
    with intercepted(model, around):
        return model(
            ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits


def ids_dtype(site: AttentionSite) -> torch.dtype:
    return site.arguments["query"].dtype


@torch.no_grad()
def compressed(
    model: Any, ids: Tensor, prompt: int, attention_mask: Tensor | None = None, **settings: Any
) -> CompressedCache:
    """A cache after the prompt."""
    cache = CompressedCache(model, **({"decode_eviction": False} | settings))
    mask = None if attention_mask is None else attention_mask[:, :prompt]
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with cache.attached():
        model(
            ids[:, :prompt],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache.key_values,
        )
    return cache
