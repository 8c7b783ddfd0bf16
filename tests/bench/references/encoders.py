"""BERT, ViT, the trained ALBERT and torch's TransformerEncoder: bidirectional."""

from __future__ import annotations

from typing import Any

import torch
from albert import REACTIONS, load_albert
from references.case import Batch, Call, Case, liven, padded, spread_heads, tokens, using
from references.formulas import Attention, dot, project, visible
from torch import Tensor, nn

VOCABULARY, LAYERS, HEADS, WIDTH, LENGTH = 96, 2, 4, 64, 40
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "initializer_range": 0.15,
}


def build_bert(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a BERT with the second sequence padded on the right."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **SMALL, vocab_size=VOCABULARY, max_position_embeddings=64, **using(implementation)
    )
    model: Any = BertModel(config)
    liven(model)
    for layer in model.encoder.layer:
        spread_heads(layer.attention.self.query.weight, HEADS, 0.1, 6)
    return model, {
        "input_ids": tokens(2, LENGTH, VOCABULARY),
        "attention_mask": padded(2, LENGTH, (LENGTH, 27)),
    }


def build_albert(implementation: str) -> tuple[nn.Module, Batch]:
    """Build RXNMapper's ALBERT on four reactions: one module with twelve calls."""
    model, encode = load_albert(implementation)
    return model, encode(REACTIONS)


def attend_bert(call: Call, batch: Batch) -> Attention:
    """Attend as BERT: scores q·k/√D over the keys that are not padding."""
    module, hidden = call.module, call.inputs["hidden_states"]
    return plain(
        hidden, module.query, module.key, module.num_attention_heads, batch["attention_mask"].bool()
    )


def build_vit(implementation: str) -> tuple[nn.Module, Batch]:
    """Build a ViT on 24 × 24 images in patches of 4: 37 tokens, all visible."""
    from transformers import ViTConfig, ViTModel

    model: Any = ViTModel(ViTConfig(**SMALL, image_size=24, patch_size=4, **using(implementation)))
    liven(model)
    for layer in model.layers:
        spread_heads(layer.attention.q_proj.weight, HEADS, 0.1, 6)
    pixels = torch.randn(
        2, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return model, {"pixel_values": pixels.to(torch.get_default_dtype())}


def attend_vit(call: Call, batch: Batch) -> Attention:
    """Attend as ViT: scores q·k/√D over all keys."""
    module, hidden = call.module, call.inputs["hidden_states"]
    return plain(
        hidden, module.q_proj, module.k_proj, HEADS, torch.ones(hidden.shape[:2], dtype=torch.bool)
    )


def build_torch(implementation: str) -> tuple[nn.Module, Batch]:
    """Build an ``nn.TransformerEncoder`` in training mode.

    With dropout 0.1 and padding on the right.
    """
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 96, dropout=0.1, batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    liven(model)
    for block in model.layers:
        attention: Any = block.self_attn
        nn.init.normal_(attention.in_proj_weight, std=0.125)
        spread_heads(attention.in_proj_weight[:WIDTH], HEADS, 0.1, 6)
    source = torch.randn(
        2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    padding = ~padded(2, LENGTH, (LENGTH, 27)).bool()
    return model, {"src": source.to(torch.get_default_dtype()), "src_key_padding_mask": padding}


def attend_torch(call: Call, batch: Batch) -> Attention:
    """Attend as torch: q and k are the first two thirds of one stacked projection."""
    module = call.module
    q_weight, k_weight, _ = module.in_proj_weight.chunk(3)
    q_bias, k_bias, _ = module.in_proj_bias.chunk(3)
    query = project(call.inputs["query"], q_weight, q_bias, HEADS)
    key = project(call.inputs["key"], k_weight, k_bias, HEADS)
    return Attention(
        dot(query, key, query.shape[-1] ** -0.5), visible(~batch["src_key_padding_mask"], LENGTH)
    )


def plain(hidden: Tensor, query: nn.Linear, key: nn.Linear, heads: int, keys: Tensor) -> Attention:
    """Attend with two linear layers and nothing else."""
    q, k = (
        project(hidden, query.weight, query.bias, heads),
        project(hidden, key.weight, key.bias, heads),
    )
    return Attention(dot(q, k, q.shape[-1] ** -0.5), visible(keys, hidden.shape[1]))


CASES = (
    Case("BERT, padding", build_bert, "BertSelfAttention", attend_bert, LAYERS),
    Case("ALBERT, trained weights", build_albert, "AlbertAttention", attend_bert, 12, trained=True),
    Case("ViT", build_vit, "ViTAttention", attend_vit, LAYERS),
    Case(
        "nn.TransformerEncoder, training",
        build_torch,
        nn.MultiheadAttention,
        attend_torch,
        LAYERS,
        ("torch",),
        training=True,
    ),
)
