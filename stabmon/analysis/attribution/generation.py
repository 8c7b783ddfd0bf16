"""Attribute every generated token to the tokens before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import takes, undisturbed
from stabmon.analysis.rollout.api import attention_rollout
from stabmon.analysis.rollout.mixing import HeadFusion
from stabmon.analysis.rollout.result import Rollout


@dataclass(frozen=True, eq=False)
class GenerationAttribution:
    """Hold each generated token's attribution to the tokens before it.

    Attributes:
        tokens: ``[B, S]`` ids, prompt and generated; of an encoder–decoder the decoder's.
        prompt_length: how many of them were given.
        rollout: ``matrix [B, n, S]`` for n generated tokens, or over the encoder's tokens where
            stacks are joined. The target of a generated token is the position before it, whose
            output predicts it.
        generated: ``[B, n]`` bool; False after a sample has ended, where rows are NaN.
    """

    tokens: Tensor
    prompt_length: int
    rollout: Rollout
    generated: Tensor


def generation_attribution(
    model: Any,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int = 20,
    residual: float = 0.5,
    start_layer: int = 0,
    head_fusion: HeadFusion = "mean",
    **generate: Any,
) -> GenerationAttribution:
    """Generate tokens and attribute each to what came before it, one row a token.

    Under a causal mask the maps of a forward over prompt and continuation are those of every step,
    so that one forward serves all
    steps: memory is linear in the length, n rows of it. Nothing of S x n x layers x heads is kept.

    Args:
        model: a transformers model with ``generate``.
        batch: the prompt, with ``input_ids`` and, where there is padding, ``attention_mask``.
        max_new_tokens: how many at most.
        residual, start_layer, head_fusion: see
            :func:`stabmon.analysis.rollout.api.attention_rollout`.
        generate: more for ``generate``; greedy without.

    Returns:
        Tokens and their rows; an encoder–decoder's rows are over the encoder's tokens
        (``stack="joined"``).

    Raises:
        ValueError: if the model cannot generate, or the batch has no ``input_ids``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=None))
        >>> found = generation_attribution(model, {"input_ids": torch.tensor([[3, 4, 5]])}, max_new_tokens=2)
        >>> found.tokens.shape, found.rollout.matrix.shape, found.rollout.targets.tolist()
        (torch.Size([1, 5]), torch.Size([1, 2, 5]), [[2, 3]])
    """
    generator: Any = getattr(model, "generate", None)
    if not isinstance(model, nn.Module) or not callable(generator):
        raise ValueError(
            f"{type(model).__name__} has no generate: give a transformers model that generates"
        )
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError("the batch has no input_ids: give a mapping with the prompt")
    with undisturbed(model), torch.no_grad():
        tokens = generator(
            **batch, max_new_tokens=max_new_tokens, **{"do_sample": False, **generate}
        )
    is_joined = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    start = 1 if is_joined else batch["input_ids"].shape[1]
    count = tokens.shape[1] - start
    if count < 1:
        raise ValueError(
            "nothing was generated: give max_new_tokens of at least 1, or another prompt"
        )
    generated = _before_end(tokens[:, start:], model)
    places = torch.arange(start - 1, tokens.shape[1] - 1, device=tokens.device)
    last = (
        generated.sum(1, keepdim=True) + start - 2
    )  # a sample that ended repeats its last row, struck out below
    targets = places[None].minimum(last)
    options: dict[str, Any] = {
        "residual": residual,
        "start_layer": start_layer,
        "head_fusion": head_fusion,
    }
    if is_joined:
        rollout = attention_rollout(
            model,
            {**batch, "decoder_input_ids": tokens},
            targets=targets,
            stack="joined",
            **options,
        )
    else:
        rollout = attention_rollout(
            model, _continued(model, batch, tokens, generated), targets=targets, **options
        )
    blank = ~generated
    matrix = rollout.matrix.masked_fill(blank[..., None], torch.nan)
    share = rollout.first_token_share.masked_fill(blank, torch.nan)
    return GenerationAttribution(
        tokens, start, replace(rollout, matrix=matrix, first_token_share=share), generated
    )


def _before_end(new: Tensor, model: Any) -> Tensor:
    """``[B, n]`` bool: tokens up to and with the first that ends the text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(getattr(model, "config", None), "eos_token_id", None)
    if ends is None:
        return torch.ones_like(new, dtype=torch.bool)
    is_end = torch.isin(new, torch.as_tensor(ends, device=new.device))
    return is_end.cumsum(1) - is_end.long() == 0


def _continued(
    model: nn.Module, batch: Mapping[str, Any], tokens: Tensor, generated: Tensor
) -> dict[str, Any]:
    """The batch with its continuation, at the positions that ``generate`` gave it."""
    prompt = batch.get("attention_mask")
    if prompt is None:
        prompt = torch.ones_like(batch["input_ids"])
    mask = torch.cat([prompt, generated.to(prompt.dtype)], dim=1)
    out = {**batch, "input_ids": tokens, "attention_mask": mask}
    if takes(model, "position_ids") and not bool(mask.all()):
        out["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return out
