"""Attention probabilities of a model, computed in ways that share nothing with the capture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.records import AttentionCall


def probabilities(call: AttentionCall) -> Tensor:
    """Return a record's probabilities ``[B, H, Q, K]`` in float64; rows that see no key are NaN."""
    if call.scores is not None:
        scores = call.scores.double()
    else:
        assert call.query is not None
        assert call.key is not None
        query, key = call.query.double(), call.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = call.scale * (query @ key.transpose(-1, -2))
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -torch.inf)
    elif call.mask is not None:
        scores = scores + call.mask.double()
        scores = scores.masked_fill(call.mask <= torch.finfo(call.mask.dtype).min / 2, -torch.inf)
    queries, keys = scores.shape[-2:]
    age = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    if call.is_causal:
        scores = scores.masked_fill(age < 0, -torch.inf)
    if call.window is not None:
        scores = scores.masked_fill(age >= call.window, -torch.inf)
    if call.sinks is not None:
        extra = call.sinks.double() if call.sinks.ndim > 1 else call.sinks.double().view(1, -1, 1)
        extra = extra.expand(scores.shape[:-1])[..., None]
        return torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def captured(
    model: nn.Module, inputs: dict[str, Any], **options: Any
) -> tuple[dict[str, Tensor], dict[str, int], list[AttentionCall]]:
    """Return probabilities by layer, calls by adapter, and the calls of one forward."""
    calls: list[AttentionCall] = []
    errors: list[Exception] = []
    with AttentionCapture(model, calls.append, on_error=errors.append, **options) as capture:
        model(**inputs)
    assert not errors, errors
    assert len({call.layer for call in calls}) == len(calls)
    return {call.layer: probabilities(call) for call in calls}, dict(capture.calls), calls


def returned(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return the probabilities that an eager transformers model returns, in the order of calls."""
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    parts = [outputs.get(name) for name in ("attentions", "encoder_attentions")]
    found = [p for part in parts if part is not None for p in part]
    crossed = outputs.get("cross_attentions") or ()
    for own, cross in zip(outputs.get("decoder_attentions") or (), crossed, strict=False):
        found += [own, cross]
    return [p for p in found if p is not None]


def of_fused_kernel(
    model: nn.Module, inputs: dict[str, Any], patch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Return the output of torch's fused function for the identity matrix as values."""
    found: list[Tensor] = []
    kernel = nn.functional.scaled_dot_product_attention

    def asked(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        identity = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:-1], -1)
        p = kernel(query, key, identity, *more, **options)
        found.append(p.reshape(len(p), -1, p.shape[-2], p.shape[-1]))
        return kernel(query, key, value, *more, **options)

    with patch.context() as patched, torch.no_grad():
        patched.setattr(nn.functional, "scaled_dot_product_attention", asked)
        model(**inputs)
    return found


def of_multihead(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return the weights that each ``nn.MultiheadAttention`` of a model returns on request."""
    asked: list[tuple[nn.MultiheadAttention, Any, Any]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: asked.append((m, args, kwargs)), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    with torch.no_grad():
        model(**inputs)
        for hook in hooks:
            hook.remove()
        return [
            module(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))[1]
            for module, args, kwargs in asked
        ]


def of_hand_written(model: nn.Module, inputs: dict[str, Any], how: str) -> list[Tensor]:
    """Return the causal attention of the zoo's own ``Attention``, from its input in float64."""
    seen: list[Tensor] = []
    blocks = list(model.blocks)  # type: ignore[arg-type]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in blocks
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    found = []
    for block, x in zip(blocks, seen, strict=True):
        batch, length, width = x.shape
        qkv = nn.functional.linear(x.double(), block.qkv.weight.double(), block.qkv.bias.double())
        q, k, _ = (
            part.view(batch, length, block.n_head, -1).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        age = torch.arange(length)[:, None] - torch.arange(length)
        scores = q @ k.mT / math.sqrt(width // block.n_head)
        if how == "cosine":
            scores = 4 * nn.functional.cosine_similarity(
                q[..., :, None, :], k[..., None, :, :], dim=-1
            )
        scores = {
            "softcap": 3 * torch.tanh(scores / 3),
            "alibi": scores - 0.3 * age,
            "flex_score": scores - 0.1 * age,
        }.get(how, scores)
        found.append(scores.masked_fill(age < 0, -torch.inf).softmax(-1).detach())
    return found
