"""Simulation of a compressed cache on the attention of an unmodified model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.analysis.forward import mask_positions, run_model, takes
from stabmon.analysis.kv_cache.budgets import check_cache
from stabmon.analysis.kv_cache.cache.compressed import CompressedCache
from stabmon.analysis.kv_cache.cache.decode import decode, full_log_probabilities
from stabmon.analysis.kv_cache.cache.stock_cache import cached_heads, left_out_layers
from stabmon.analysis.kv_cache.checks import check_count
from stabmon.analysis.kv_cache.generate import check_prompt
from stabmon.analysis.kv_cache.policies.cake import Cake
from stabmon.analysis.kv_cache.policy import Policy, policy_of
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.analysis.kv_cache.report import CakeReport
from stabmon.analysis.kv_cache.seen import SeenLayer, stages_of
from stabmon.analysis.kv_cache.sharing import Sharing
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall


def simulate_cake(
    model: nn.Module,
    batch: Any,
    *,
    cache_size: int | float,
    window_size: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
    gamma: float = 200.0,
    pool: int = 5,
    allotment: str = "filled",
    max_new_tokens: int = 0,
    continuation: Tensor | None = None,
) -> CakeReport:
    """Simulate CAKE's cache on the attention of an unmodified model.

    The prompt goes through the model once, with whatever attention kernel it has; queries and keys
    are read as they pass, and no S by S map is formed. With ``max_new_tokens`` or a continuation,
    tokens are then really decoded with the compressed cache.

    Args:
        model: a causal decoder. Decoding needs a model of transformers.
        batch: the prompts: a mapping with ``input_ids`` ``[B, S]`` and, where samples are padded,
            ``attention_mask``; or a tensor. Positions of a sample padded on the left start at its
            first token, as in ``generate``.
        cache_size: keys that each key head keeps, on average over layers, the window included:
            tokens (int), or a share of each sample's prompt (float in (0, 1]).
        window_size: number of last queries, which judge the other keys and whose own keys always
            stay; 2 or more, below the cache size.
        tau1, tau2: temperatures of dispersion and shift in the preference, above 0.
        gamma: weight of the variance in a key's score, 0 or above.
        pool: odd width of the average over neighbouring keys.
        allotment: ``filled`` uses the whole cache, ``published`` follows the paper's code.
        max_new_tokens: number of most likely tokens to decode.
        continuation: ``[B, T]`` tokens to follow instead, for a perplexity on real text.

    Returns:
        The report. Numbers differ from the published code's, which rounds weights to float16, sums
        over the batch, and pools over keys in the order of their scores.

    Raises:
        ValueError: for an encoder, a window as long as the shortest prompt, or values out of range.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
        >>> ids = torch.arange(30)[None]
        >>> report = simulate_cake(model, ids, cache_size=12, window_size=4)
        >>> budgets = [int(layer.budget) for layer in report.layers]
        >>> sum(budgets), report.compression_ratio, report.budget_use
        (16, 0.4, 1.0)

    References:
        Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", ICLR
        2025.
    """
    policy = Cake(tau1=tau1, tau2=tau2, gamma=gamma, pool=pool, allotment=allotment)
    return simulate_cache(
        model,
        batch,
        policy=policy,
        cache_size=cache_size,
        window_size=window_size,
        max_new_tokens=max_new_tokens,
        continuation=continuation,
    )


def simulate_cache(
    model: nn.Module,
    batch: Any,
    *,
    policy: str | Policy = "cake",
    cache_size: int | float,
    window_size: int = 32,
    max_new_tokens: int = 0,
    continuation: Tensor | None = None,
) -> CakeReport:
    """Simulate any policy's cache on the attention of an unmodified model.

    Args:
        model, batch, cache_size, window_size, max_new_tokens, continuation: see
            :func:`simulate_cake`.
        policy: a name, or a :class:`~stabmon.analysis.kv_cache.policy.Policy`.

    Returns:
        The report, with dispersion and shift for every policy.

    Raises:
        ValueError: as :func:`simulate_cake`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
        >>> ids = torch.arange(30)[None]
        >>> report = simulate_cache(model, ids, policy="recency", cache_size=10, window_size=4)
        >>> report.layers[0].kept[0, 0].tolist()
        [0, 1, 2, 3, 24, 25, 26, 27, 28, 29]
    """
    chosen = policy_of(policy)
    check_cache(cache_size, window_size)
    check_count("max_new_tokens", max_new_tokens, least=0)
    ids, mask = prompt_of(batch)
    batch = with_positions(model, batch, mask)
    outside, heads = left_out_layers(model), cached_heads(model, ids)
    seen: list[SeenLayer] = []
    left_out: dict[str, str] = {}
    reported: set[int] = set()

    def summarize(call: AttentionCall) -> None:
        index = getattr(call.module, "layer_idx", -1)
        reported.add(index)
        why = outside.get(index)
        if why is None:
            attention = operator_of(replace(call, is_self=True))
            layer = PromptLayer(
                call.layer, attention, heads.get(index, attention.key_heads), window_size
            )
            layer.check()
            why = "a sliding window" if layer.is_windowed else None
        if why is not None:
            left_out[call.layer] = why
            return
        if (shortest := min(layer.lengths)) <= window_size:
            raise ValueError(
                f"window_size {window_size} leaves nothing to evict of a prompt of {shortest} "
                f"tokens (sample {layer.lengths.index(shortest)}): give a longer text, or a "
                f"window_size below {shortest}"
            )
        seen.append(SeenLayer.of(layer, chosen))

    run_model(model, batch, summarize)
    if not seen:
        raise ValueError(
            f"{type(model).__name__} has no layer whose cache grows with the text: {left_out}"
        )
    left_out |= {f"layer {index}": why for index, why in outside.items() if index not in reported}
    sharing = Sharing(chosen, seen[0].lengths, cache_size, window_size, len(seen))
    fixed = chosen.fixed_claims(len(seen)) is not None
    claims = sharing.fixed() if fixed else np.stack([one.claim.numpy() for one in seen])
    budgets = sharing.one_shot(claims)
    kept = [one.choose(chosen, budget) for one, budget in zip(seen, budgets, strict=True)]

    new = torch.zeros(len(sharing.lengths), 0, dtype=torch.int64)
    scored = full = torch.zeros(len(sharing.lengths), 0)
    lost: list[Any] = []
    if max_new_tokens or continuation is not None:
        if ids is None:
            raise ValueError(
                "decoding needs input_ids: give the batch as a mapping with input_ids, or "
                "max_new_tokens=0"
            )
        check_prompt(ids, mask)
        cache = CompressedCache(
            model, policy=chosen, cache_size=cache_size, window_size=window_size, cascade=False
        )
        new, scored = decode(cache, ids, mask, steps=max_new_tokens, continuation=continuation)
        full = full_log_probabilities(model, ids, mask, new).cpu()
        new, scored, lost = new.cpu(), scored.cpu(), cache.evictions
    fed = max(0, new.shape[1] - 1)
    layers = tuple(one.report(budgets[at], kept[at], fed, lost) for at, one in enumerate(seen))
    return CakeReport(
        policy=chosen.name,
        settings=chosen.settings(),
        cache_size=cache_size,
        window_size=window_size,
        layers=layers,
        left_out=left_out,
        lengths=tuple(sharing.lengths),
        sizes=tuple(sharing.sizes),
        stages=stages_of(claims, sharing.cascade),
        token_ids=torch.zeros(0, 0, dtype=torch.int64) if ids is None else ids.cpu(),
        tokens=new,
        log_probabilities=scored,
        full_log_probabilities=full,
    )


def prompt_of(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return token ids and attention mask of a batch; None for each one missing.

    Args:
        batch: a mapping, a tuple of arguments, or a tensor.

    Example:
        >>> prompt_of({"input_ids": torch.ones(1, 3)})[1] is None
        True
    """
    if isinstance(batch, Mapping):
        return batch.get("input_ids"), batch.get("attention_mask")
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    is_ids = isinstance(first, Tensor) and first.ndim == 2 and not first.is_floating_point()
    return (first if is_ids else None), None


def with_positions(model: nn.Module, batch: Any, mask: Tensor | None) -> Any:
    """Return the batch with the position ids of ``generate``.

    They are added if samples are padded on the left and the batch has none.

    Args:
        model: the model; one without ``position_ids`` keeps its batch.
        batch: the model's input.
        mask: the batch's attention mask ``[B, S]``, or None.
    """
    padded = mask is not None and mask.ndim == 2 and not bool(mask[:, 0].all())
    if mask is None or not padded or "position_ids" in batch or not takes(model, "position_ids"):
        return batch
    return {**batch, "position_ids": mask_positions(mask)}
