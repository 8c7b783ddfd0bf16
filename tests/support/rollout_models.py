"""Small real models with what they are given, and dense float64 references of their rollouts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import takes

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass
class Case:
    """A model, its batch, and which of its tokens are padding."""

    model: nn.Module
    batch: Any
    valid: Tensor
    """``[B, N]`` bool."""
    stack: str | None = None


def ids(samples: int = 3, tokens: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def sharpen(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


def padded(length: int, samples: int = 3, *, left: bool = False) -> Tensor:
    mask = torch.ones(samples, length, dtype=torch.int64)
    if left:
        mask[1, :4] = 0
    else:
        mask[1, 7:] = 0
    return mask


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **SMALL, **TOKENS))
    return Case(sharpen(model), {"input_ids": ids()}, torch.ones(3, 11, dtype=torch.bool))


def mistral() -> Case:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(vocab_size=100, num_key_value_heads=2, sliding_window=4, **SMALL, **TOKENS)
    )
    return Case(sharpen(model), {"input_ids": ids()}, torch.ones(3, 11, dtype=torch.bool))


def bert() -> Case:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    mask = padded(11)
    model = BertForMaskedLM(BertConfig(vocab_size=100, **SMALL))
    return Case(sharpen(model), {"input_ids": ids(), "attention_mask": mask}, mask.bool())


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    mask = padded(11, left=True)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, **TOKENS))
    return Case(sharpen(model), {"input_ids": ids(), "attention_mask": mask}, mask.bool())


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **SMALL))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Case(sharpen(model), {"pixel_values": images}, torch.ones(2, 17, dtype=torch.bool))


def t5(stack: str | None = None) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, **TOKENS
    )
    return encoder_decoder(T5ForConditionalGeneration(config).eval(), stack)


def bart(stack: str | None = None) -> Case:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))
    }
    config = BartConfig(vocab_size=100, d_model=32, max_position_embeddings=64, **sides, **TOKENS)
    return encoder_decoder(sharpen(BartForConditionalGeneration(config)), stack)


def encoder_decoder(model: Any, stack: str | None) -> Case:
    mask = padded(11)
    batch = {"input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids(tokens=6, seed=1)}
    valid = mask.bool() if stack == "encoder" else torch.ones(3, 6, dtype=torch.bool)
    return Case(model, batch, valid, stack)


class HandMade(nn.Module):
    """Causal attention written out, as small educational models have it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, 2)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(tokens, tokens).tril() == 0, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        self.weights = weights.detach()
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class TinyGPT(nn.Module):
    """Three blocks of hand-written attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.blocks = nn.ModuleList([HandMade() for _ in range(3)])
        self.head = nn.Linear(32, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def maps_of(case: Case, kind: str = "own") -> list[Tensor]:
    """The maps of every layer in float64, as the eager model returns them; with the graph, for
    gradients.
    """
    found, _ = eager(case)
    names = {
        "own": ("attentions", "decoder_attentions"),
        "encoder": ("encoder_attentions",),
        "cross": ("cross_attentions",),
    }
    return next(list(found[name]) for name in names[kind] if found.get(name) is not None)


def eager(case: Case) -> tuple[Any, Any]:
    model: Any = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in case.batch.items()
    }
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    return model.double().eval()(**batch, **options, output_attentions=True), model


def mixed(fused: Tensor, residual: float = 0.5) -> Tensor:
    """``[B, S, S]``: residual and attention, rows summing to 1."""
    matrix = residual * torch.eye(fused.shape[-1], dtype=fused.dtype) + (1 - residual) * fused
    return matrix / matrix.sum(-1, keepdim=True)


FUSE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(1),
    "max": lambda maps: maps.amax(1),
    "min": lambda maps: maps.amin(1),
}


def dense_rollout(maps: list[Tensor], fusion: str = "mean", residual: float = 0.5) -> Tensor:
    rollout = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for each in maps:
        rollout = mixed(FUSE[fusion](each.detach().double()), residual) @ rollout
    return rollout


def dense_joined(encoder: list[Tensor], decoder: list[Tensor], cross: list[Tensor]) -> Tensor:
    """Rollout over the tokens of both stacks together, written out as one square matrix a layer,
    then the encoder's columns.
    """
    sources, targets = encoder[0].shape[-1], decoder[0].shape[-1]
    size = sources + targets
    rollout = torch.eye(size, dtype=torch.float64)
    layers = [("encoder", each) for each in encoder]
    for own, other in zip(decoder, cross, strict=True):
        layers += [("decoder", own), ("cross", other)]
    for part, maps in layers:
        attention = torch.zeros(len(maps), size, size, dtype=torch.float64)
        if part == "encoder":
            attention[:, :sources, :sources] = maps.mean(1)
            attention[:, sources:, sources:] = torch.eye(targets)
        else:
            attention[:, :sources, :sources] = torch.eye(sources)
            columns = slice(sources, size) if part == "decoder" else slice(0, sources)
            attention[:, sources:, columns] = maps.mean(1)
        rollout = mixed(attention) @ rollout
    owed = rollout[:, sources:, :sources]
    return owed / owed.sum(-1, keepdim=True)
