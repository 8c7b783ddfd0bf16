"""T5 and Whisper: self-attention of encoder and decoder, and cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from references.case import Batch, Call, Case, liven, padded, spread_heads, tokens, using
from references.formulas import Attention, dot, project, t5_bias, visible
from torch import nn

VOCABULARY, LAYERS, HEADS, WIDTH, SOURCE, TARGET = 96, 2, 4, 64, 40, 24
BUCKETS, FURTHEST = 16, 24


def build_t5(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a T5 with the second source padded.

    16 buckets up to distance 24, so that every kind of bucket is used.
    """
    from transformers import T5Config, T5Model

    model: Any = T5Model(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=16,
            d_ff=96,
            num_layers=LAYERS,
            num_heads=HEADS,
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=FURTHEST,
            dropout_rate=0.0,
            **using(implementation),
        )
    )
    liven(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("SelfAttention", "EncDecAttention")):
                spread_heads(module.q.weight, HEADS, 0.1, 8)
            if name.endswith("relative_attention_bias"):
                module.weight *= 10.0
    return model, {
        "input_ids": tokens(2, SOURCE, VOCABULARY),
        "attention_mask": padded(2, SOURCE, (SOURCE, 29)),
        "decoder_input_ids": tokens(2, TARGET, VOCABULARY, seed=2),
    }


def attend_t5(call: Call, batch: Batch) -> Attention:
    """Attend as T5, without a scale.

    Each stack's first layer owns the position bias of all its layers; cross-attention has none.
    """
    module, hidden, memory = (
        call.module,
        call.inputs["hidden_states"],
        call.inputs.get("key_value_states"),
    )
    query = project(hidden, module.q.weight, None, HEADS)
    key = project(hidden if memory is None else memory, module.k.weight, None, HEADS)
    scores = dot(query, key, 1.0)
    encoder = call.name.startswith("encoder.")
    if memory is None:
        stack = call.model.encoder if encoder else call.model.decoder
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        scores = scores + t5_bias(
            table, *scores.shape[2:], bidirectional=encoder, furthest=FURTHEST
        )
    decoding = not encoder and memory is None
    keys = (
        torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
        if decoding
        else batch["attention_mask"].bool()
    )
    return Attention(scores, visible(keys, query.shape[2], causal=decoding))


def build_whisper(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a Whisper on 48 frames of 8 mels, without a mask.

    24 encoder positions, 20 decoder tokens.
    """
    from transformers import WhisperConfig, WhisperModel

    model: Any = WhisperModel(
        WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=24,
            max_target_positions=32,
            init_std=0.15,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            **using(implementation),
        )
    )
    liven(model)
    for name, module in model.named_modules():
        if name.endswith("_attn"):
            spread_heads(module.q_proj.weight, HEADS, 0.1, 6)
    sound = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, {
        "input_features": sound.to(torch.get_default_dtype()),
        "decoder_input_ids": tokens(2, 20, VOCABULARY),
    }


def attend_whisper(call: Call, batch: Batch) -> Attention:
    """Attend as Whisper.

    The key projection has no bias; only the decoder's self-attention is causal.
    """
    module, hidden, memory = (
        call.module,
        call.inputs["hidden_states"],
        call.inputs.get("key_value_states"),
    )
    query = project(hidden, module.q_proj.weight, module.q_proj.bias, HEADS)
    key = project(hidden if memory is None else memory, module.k_proj.weight, None, HEADS)
    keys = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    decoding = call.name.startswith("decoder.") and memory is None
    return Attention(
        dot(query, key, (WIDTH // HEADS) ** -0.5), visible(keys, query.shape[2], causal=decoding)
    )


CASES = (
    Case("T5, relative bias, padding", build_t5, "T5Attention", attend_t5, 3 * LAYERS),
    Case("Whisper", build_whisper, "WhisperAttention", attend_whisper, 3 * LAYERS),
)
