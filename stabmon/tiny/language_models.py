"""Small byte-level language models of the transformers library, untrained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stabmon._settings import Count
from stabmon.tiny.corpus import VOCABULARY


class ShapeError(ValueError):
    """An impossible size of a model; the message is one line and names the mend."""


@dataclass(frozen=True)
class Shape:
    """Size of a transformers model; no weights are loaded."""

    architecture: Literal["llama", "gpt2"] = "llama"
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count | None = None
    """Key heads of a Llama; None for as many as query heads."""
    width: Count = 128


def make_model(shape: Shape, block: int) -> Any:
    """Make the untrained model.

    Args:
        shape: its size.
        block: largest number of positions.

    Raises:
        ShapeError: if GPT-2 is asked for fewer key heads than query heads.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokens: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if shape.architecture == "gpt2":
        if shape.kv_heads not in (None, shape.heads):
            raise ShapeError(
                f"model.kv_heads is {shape.kv_heads}, but GPT-2 has no grouped heads: leave it "
                "out, or use llama"
            )
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=shape.layers,
                n_head=shape.heads,
                n_embd=shape.width,
                n_positions=block,
                **tokens,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            max_position_embeddings=block,
            tie_word_embeddings=True,
            pad_token_id=None,
            **tokens,
        )
    )
