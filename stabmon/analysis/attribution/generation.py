"""Attribution of every generated token to the tokens before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import mask_positions, takes, undisturbed
from stabmon.analysis.rollout.api import attention_rollout
from stabmon.analysis.rollout.mixing import HeadFusion
from stabmon.analysis.rollout.result import Rollout


@dataclass(frozen=True, eq=False)
class GenerationAttribution:
    """Attribution of each generated token to the tokens before it.

    Attributes:
        tokens: ``[B, S]`` ids, prompt and generated; of an encoder–decoder the decoder's.
        prompt_length: number of given tokens.
        rollout: ``matrix [B, n, S]`` for n generated tokens, or over the encoder's tokens if stacks
            are joined. The target of a generated token is the position before it, whose output
            predicts it.
        generated: ``[B, n]`` bool; False after a sample has ended, in rows of NaN.

    Example:
        >>> from stabmon.analysis import attention_rollout
        >>> rollout = attention_rollout([torch.eye(4)], targets=[2])
        >>> GenerationAttribution(torch.arange(4)[None], 3, rollout, torch.tensor([[True]])).tokens
        tensor([[0, 1, 2, 3]])
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
    """Generate tokens and attribute each to the tokens before it.

    Under a causal mask the maps of a forward over prompt and continuation are those of every step,
    so that one forward serves all steps. Memory is linear in the length, with n rows for n tokens;
    no S x n x layers x heads array is kept.

    Args:
        model: a transformers model with ``generate``.
        batch: the prompt, with ``input_ids`` and, where there is padding, ``attention_mask``.
        max_new_tokens: largest number of new tokens.
        residual, start_layer, head_fusion: see
            :func:`stabmon.analysis.rollout.api.attention_rollout`.
        generate: further arguments of ``generate``; greedy by default.

    Returns:
        Tokens and their rows; an encoder–decoder's rows are over the encoder's tokens
        (``stack="joined"``).

    Raises:
        ValueError: if the model cannot generate, or the batch has no ``input_ids``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(
        ...     vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=None
        ... ))
        >>> batch = {"input_ids": torch.tensor([[3, 4, 5]])}
        >>> found = generation_attribution(model, batch, max_new_tokens=2)
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
    # an ended sample repeats its last row, which becomes NaN below
    last = generated.sum(1, keepdim=True) + start - 2
    targets = places[None].minimum(last)
    options: dict[str, Any] = {
        "residual": residual,
        "start_layer": start_layer,
        "head_fusion": head_fusion,
    }
    if is_joined:
        given, options["stack"] = {**batch, "decoder_input_ids": tokens}, "joined"
    else:
        given = _continued(model, batch, tokens, generated)
    rollout = attention_rollout(model, given, targets=targets, **options)
    blank = ~generated
    matrix = rollout.matrix.masked_fill(blank[..., None], torch.nan)
    share = rollout.first_token_share.masked_fill(blank, torch.nan)
    return GenerationAttribution(
        tokens, start, replace(rollout, matrix=matrix, first_token_share=share), generated
    )


def _before_end(new: Tensor, model: Any) -> Tensor:
    """Mark the tokens up to and including the first end of text, ``[B, n]`` bool."""
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
    """Return the batch with its continuation, at the positions used by ``generate``."""
    prompt = batch.get("attention_mask")
    if prompt is None:
        prompt = torch.ones_like(batch["input_ids"])
    mask = torch.cat([prompt, generated.to(prompt.dtype)], dim=1)
    out = {**batch, "input_ids": tokens, "attention_mask": mask}
    if takes(model, "position_ids") and not bool(mask.all()):
        out["position_ids"] = mask_positions(mask)
    return out
