"""Generation with a compressed cache, on a stock model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.kv_cache.cache.compressed import CompressedCache
from stabmon.analysis.kv_cache.policy import Policy


@dataclass(frozen=True, eq=False)
class CompressedGeneration:
    """Generated tokens and the cache they were generated with."""

    sequences: Tensor
    """Prompt and new tokens, ``[B, S + T]``, as ``generate`` returns them."""
    tokens: Tensor
    """New tokens alone, ``[B, T]``."""
    cache: CompressedCache


def compressed_generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    policy: str | Policy = "cake",
    cache_size: int | float,
    window_size: int = 32,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 20,
    cascade: bool = True,
    decode_eviction: bool | None = None,
    **options: Any,
) -> CompressedGeneration:
    """Generate with a cache of limited size.

    The model's own ``generate`` runs, with a cache of transformers' own class; no file or class of
    the model is touched, and model and library are afterwards as they were. Layers with a sliding
    window or a recurrent state keep their whole cache; they are named in ``.cache.left_out``.

    Args:
        model: a causal language model of transformers, with sdpa, eager or flex attention.
        input_ids: ``[B, S]``; shorter prompts are padded on the left.
        policy: ``cake``, ``snapkv``, ``h2o``, ``recency``, ``random``, ``pyramid``, ``ada_snapkv``,
            ``full``, or a :class:`~stabmon.analysis.kv_cache.policy.Policy`.
        cache_size: keys that each key head keeps, on average over layers, the window included:
            tokens (int), or a share of each sample's prompt (float in (0, 1]). Samples no longer
            than this keep all.
        window_size: number of newest keys, which always stay and whose queries judge the others; 2
            or more.
        attention_mask: ``[B, S]``, 0 at padding.
        max_new_tokens: tokens to generate at most.
        cascade: shrink layers while the prompt goes through the model, so that the peak of the
            cache is one full layer above its final size; else after the last layer.
        decode_eviction: evict while decoding too, so that the cache stays within its size; None for
            the policy's published behaviour (SnapKV and its variants let it grow).
        options: further arguments of ``generate``.

    Returns:
        The sequences, and the cache with its evictions.

    Raises:
        ValueError: for encoders and encoder–decoders, padding on the right, a chunked prefill, or
            values out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, eos_token_id=None,
        ... )
        >>> made = compressed_generate(
        ...     LlamaForCausalLM(config), torch.arange(30)[None], cache_size=12, window_size=4,
        ...     max_new_tokens=5, do_sample=False,
        ... )
        >>> kept = made.cache.kept().values()
        >>> made.sequences.shape, {len(layer[0, 0]) for layer in kept} <= set(range(5, 21))
        (torch.Size([1, 35]), True)
    """
    check_prompt(input_ids, attention_mask)
    if options.get("prefill_chunk_size"):
        raise ValueError(
            "prefill_chunk_size: keys are chosen after the whole prompt, leave this argument out"
        )
    cache = CompressedCache(
        model,
        policy=policy,
        cache_size=cache_size,
        window_size=window_size,
        cascade=cascade,
        decode_eviction=decode_eviction,
    )
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    generator: Any = model  # CompressedCache has checked that it is a model of transformers
    with cache.attached(), torch.no_grad():
        made = generator.generate(
            input_ids, past_key_values=cache.key_values, max_new_tokens=max_new_tokens, **options
        )
    sequences = made if isinstance(made, Tensor) else made.sequences
    return CompressedGeneration(sequences, sequences[:, input_ids.shape[1] :], cache)


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise an error for a prompt in a shape or padding unfit for generation.

    Args:
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, 0 at padding, or None.

    Raises:
        ValueError: for another shape, an empty prompt, or padding at its end.

    Example:
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> check_prompt(torch.ones(1, 3), mask)  # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
        ValueError: sample 0 of attention_mask ends in padding: pad on the left
            (tokenizer.padding_side = 'left')
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)}: give [B, S] with at least one token"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} for input_ids "
            f"{tuple(input_ids.shape)}: give one of the same shape"
        )
    padded = (attention_mask[:, -1] == 0).nonzero()
    if len(padded):
        raise ValueError(
            f"sample {int(padded[0])} of attention_mask ends in padding: pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
