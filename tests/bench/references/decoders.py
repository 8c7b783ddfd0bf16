"""GPT-2, Llama, Mistral, Qwen3 and Gemma 2: causal self-attention."""

from __future__ import annotations

from typing import Any

import torch
from references.case import Batch, Call, Case, liven, padded, spread_heads, tokens, using
from references.formulas import Attention, dot, project, rms_norm, rope, visible
from torch import Tensor, nn

VOCABULARY, LAYERS, HEADS, KEY_HEADS, WIDTH, LENGTH, WINDOW, CAP = 96, 2, 4, 2, 64, 200, 50, 20.0
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
}


def key_mask(batch: Batch) -> Tensor:
    """Return bool ``[B, S]``: the real tokens."""
    return (
        batch["attention_mask"].bool()
        if "attention_mask" in batch
        else torch.ones_like(batch["input_ids"]).bool()
    )


def build_gpt2(implementation: str, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    """Build a GPT-2 with left padding.

    The first rows of a padded sequence see no key at all.
    """
    from transformers import GPT2Config, GPT2Model

    model: Any = GPT2Model(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=256,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            initializer_range=0.15,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            **using(implementation),
            scale_attn_by_inverse_layer_idx=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    liven(model)
    for block in model.h:
        spread_heads(block.attn.c_attn.weight.T[:WIDTH], HEADS, 0.1, 6)
    mask = padded(2, LENGTH, (LENGTH, 135), left=True)
    return model, {"input_ids": tokens(2, LENGTH, VOCABULARY), "attention_mask": mask}


def attend_gpt2(call: Call, batch: Batch) -> Attention:
    """Attend as GPT-2.

    q and k are the first two thirds of one fused projection; layer l divides the scores by l + 1
    besides √D.
    """
    module, hidden = call.module, call.inputs["hidden_states"]
    q_weight, k_weight, _ = module.c_attn.weight.T.chunk(3)
    q_bias, k_bias, _ = module.c_attn.bias.chunk(3)
    query, key = project(hidden, q_weight, q_bias, HEADS), project(hidden, k_weight, k_bias, HEADS)
    layer = int(call.name.split(".")[1])
    scores = dot(query, key, (WIDTH // HEADS) ** -0.5 / (layer + 1))
    return Attention(scores, visible(key_mask(batch), LENGTH, causal=True))


def build_llama(implementation: str, steepest: float = 6.0) -> tuple[nn.Module, Batch]:
    """Build a Llama with two query heads per key head and no mask but causality."""
    from transformers import LlamaConfig, LlamaModel

    model: Any = LlamaModel(LlamaConfig(**SMALL, attention_bias=True, **using(implementation)))
    liven(model)
    for layer in model.layers:
        spread_heads(layer.self_attn.q_proj.weight, HEADS, 0.1, steepest)
    return model, {"input_ids": tokens(2, LENGTH, VOCABULARY)}


def build_mistral(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a Mistral with a window of 50 in sequences of 200.

    The second one is padded on the left.
    """
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(**SMALL, sliding_window=WINDOW, **using(implementation))
    model: Any = MistralModel(config)
    liven(model)
    for layer in model.layers:
        spread_heads(layer.self_attn.q_proj.weight, HEADS, 0.1, 6)
    mask = padded(2, LENGTH, (LENGTH, 137), left=True)
    return model, {"input_ids": tokens(2, LENGTH, VOCABULARY), "attention_mask": mask}


def build_qwen3(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a Qwen3 with RMS norms on query and key and padding on the right.

    Its head width is 24, not model width over heads.
    """
    from transformers import Qwen3Config, Qwen3Model

    model: Any = Qwen3Model(Qwen3Config(**SMALL, head_dim=24, **using(implementation)))
    liven(model)
    with torch.no_grad():
        for layer, gain in zip(model.layers, (0.2, 12.0), strict=True):
            layer.self_attn.q_norm.weight *= gain
    mask = padded(2, LENGTH, (LENGTH, 140))
    return model, {"input_ids": tokens(2, LENGTH, VOCABULARY), "attention_mask": mask}


def build_gemma2(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a Gemma 2 with a softcap of 20 and a window in one layer.

    The scale is not 1/√D; a window of 50 in the first layer and none in the second.
    """
    from transformers import Gemma2Config, Gemma2Model

    model: Any = Gemma2Model(
        Gemma2Config(
            **SMALL,
            head_dim=16,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=CAP,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            **using(implementation),
        )
    )
    liven(model)
    for layer in model.layers:
        spread_heads(layer.self_attn.q_proj.weight, HEADS, 0.1, 10)
    return model, {"input_ids": tokens(2, LENGTH, VOCABULARY)}


def attend_rotary(call: Call, batch: Batch) -> Attention:
    """Attend as the Llama line.

    Linear q and k, norms on them where the model has them, RoPE, grouped heads.
    """
    module, hidden, config = call.module, call.inputs["hidden_states"], call.module.config
    query = project(hidden, module.q_proj.weight, module.q_proj.bias, HEADS)
    key = project(hidden, module.k_proj.weight, module.k_proj.bias, KEY_HEADS)
    if config.model_type == "qwen3":
        query = rms_norm(query, module.q_norm.weight, config.rms_norm_eps)
        key = rms_norm(key, module.k_norm.weight, config.rms_norm_eps)
    theta = config.rope_parameters["rope_theta"]
    scores = dot(
        rope(query, theta), rope(key, theta), width_under_root(config, query.shape[-1]) ** -0.5
    )
    first_layer = ".0." in call.name
    windowed = config.model_type == "mistral" or (config.model_type == "gemma2" and first_layer)
    seen = visible(key_mask(batch), LENGTH, causal=True, window=WINDOW if windowed else None)
    return Attention(scores, seen, CAP if config.model_type == "gemma2" else None)


def width_under_root(config: Any, head_width: int) -> int:
    """Return the number under the root in the scale: Gemma 2 sets its own."""
    return 24 if config.model_type == "gemma2" else head_width


CASES = (
    Case("GPT-2", build_gpt2, "GPT2Attention", attend_gpt2, LAYERS),
    Case(
        "GPT-2, training, dropout 0.1",
        lambda kind: build_gpt2(kind, 0.1),
        "GPT2Attention",
        attend_gpt2,
        LAYERS,
        training=True,
    ),
    Case("Llama, grouped heads", build_llama, "LlamaAttention", attend_rotary, LAYERS),
    Case(
        "Llama, scores to 2000",
        lambda kind: build_llama(kind, 300.0),
        "LlamaAttention",
        attend_rotary,
        LAYERS,
    ),
    Case(f"Mistral, window {WINDOW}", build_mistral, "MistralAttention", attend_rotary, LAYERS),
    Case("Qwen3, qk-norm", build_qwen3, "Qwen3Attention", attend_rotary, LAYERS),
    Case(
        f"Gemma 2, softcap {CAP:.0f}, window",
        build_gemma2,
        "Gemma2Attention",
        attend_rotary,
        LAYERS,
        implementations=("eager",),
    ),
)
"""Gemma 2 has no sdpa form: transformers refuses it, for the softcap."""
