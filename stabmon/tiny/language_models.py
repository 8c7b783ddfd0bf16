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
    """Size of a transformers model; no weights are loaded.

    Raises:
        ShapeError: for sizes that do not fit together.

    Example:
        >>> Shape(heads=3)
        Traceback (most recent call last):
        stabmon.tiny.language_models.ShapeError: width 128 must be a multiple of twice the 3 heads: use 126
    """

    architecture: Literal["llama", "gpt2"] = "llama"
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count | None = None
    """Key heads of a Llama; None for as many as query heads."""
    width: Count = 128

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            nearest = 2 * self.heads * max(1, self.width // (2 * self.heads))
            raise ShapeError(
                f"width {self.width} must be a multiple of twice the {self.heads} heads: use "
                f"{nearest}"
            )
        kv_heads = self.kv_heads or self.heads
        if self.architecture == "gpt2" and kv_heads != self.heads:
            raise ShapeError(
                f"kv_heads is {kv_heads}, but GPT-2 has no grouped heads: leave it out, or use llama"
            )
        if self.heads % kv_heads:
            raise ShapeError(
                f"kv_heads {kv_heads} must divide the {self.heads} heads: leave it out, or use 1"
            )


def make_model(shape: Shape, block: int) -> Any:
    """Make the untrained model.

    Args:
        shape: its size.
        block: largest number of positions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokens: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if shape.architecture == "gpt2":
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
