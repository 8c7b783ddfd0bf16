"""Perplexity of real text against the size of its context's compressed cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabmon.analysis.forward import undisturbed
from stabmon.analysis.kv_cache.cache.decode import follow
from stabmon.analysis.kv_cache.checks import check_count
from stabmon.analysis.kv_cache.policy import POLICIES, Policy, policy_of
from stabmon.analysis.kv_cache.prefill import Prefill


@dataclass(frozen=True, eq=False)
class PerplexityTable:
    """Loss of each continuation by policy, cache size and prompt, in nats per token.

    The loss is the mean negative log-probability of the continuation's tokens.

    Example:
        >>> losses, full = np.log([[[4.0]]]), np.log([2.0])
        >>> table = PerplexityTable(("h2o",), (8,), losses, full, 32, 4, np.array([[0.25]]))
        >>> table.perplexity.round(6).tolist(), table.cost.round(3).tolist()
        ([[4.0]], [[[0.693]]])
    """

    policies: tuple[str, ...]
    sizes: tuple[int | float, ...]
    nats: NDArray[np.float64]
    """Loss with the compressed cache, ``[policies, sizes, prompts]``."""
    full: NDArray[np.float64]
    """Loss with the full cache, ``[prompts]``."""
    context: int
    """Tokens of each prompt."""
    continuation: int
    """Scored tokens after each prompt."""
    kept: NDArray[np.float64]
    """Kept share of the context's keys, ``[policies, sizes]``.

    The share is over layers, heads and prompts.
    """

    @property
    def perplexity(self) -> NDArray[np.float64]:
        """Compute exp of the mean loss over prompts, ``[policies, sizes]``."""
        perplexity: NDArray[np.float64] = np.exp(self.nats.mean(-1))
        return perplexity

    @property
    def cost(self) -> NDArray[np.float64]:
        """Compute the nats lost against the full cache, ``[policies, sizes, prompts]``."""
        return self.nats - self.full

    def entries(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return values and arrays for a record.

        Values: ``perplexity_policies``, ``perplexity_sizes``, ``perplexity_context``,
        ``perplexity_continuation``. Arrays: ``perplexity_nats`` ``[policies, sizes, prompts]``,
        ``perplexity_full_nats`` ``[prompts]``, ``perplexity_kept`` ``[policies, sizes]``; a figure
        draws ``exp`` of their means over prompts, and the spread between prompts.
        """
        values = {
            "perplexity_policies": list(self.policies),
            "perplexity_sizes": list(self.sizes),
            "perplexity_context": self.context,
            "perplexity_continuation": self.continuation,
        }
        arrays = {
            "perplexity_nats": self.nats,
            "perplexity_full_nats": self.full,
            "perplexity_kept": self.kept,
        }
        return values, arrays

    def to_markdown(self) -> str:
        """Return a table of perplexities, with the cost in nats.

        The cost is the mean over prompts, with its 10% and 90% quantiles.

        Example:
            >>> losses, full = np.log([[[4.0]]]), np.log([2.0])
            >>> table = PerplexityTable(("h2o",), (8,), losses, full, 32, 4, np.array([[0.25]]))
            >>> print(table.to_markdown())
            | cache | h2o |
            |---|---|
            | 8 | 4.000 (+0.693, +0.693 … +0.693) |
            | full | 2.000 |
        """
        lines = [f"| cache | {' | '.join(self.policies)} |", f"|---{'|---' * len(self.policies)}|"]
        for at, size in enumerate(self.sizes):
            cells = []
            for policy in range(len(self.policies)):
                cost = self.cost[policy, at]
                low, high = np.quantile(cost, [0.1, 0.9])
                cells.append(
                    f"{self.perplexity[policy, at]:.3f} ({cost.mean():+.3f}, {low:+.3f} … "
                    f"{high:+.3f})"
                )
            lines.append(f"| {size} | {' | '.join(cells)} |")
        rest = " |" * (len(self.policies) - 1)
        lines.append(f"| full | {np.exp(self.full.mean()):.3f} |{rest}")
        return "\n".join(lines)


def perplexity_by_cache_size(
    model: nn.Module,
    contexts: Tensor,
    continuations: Tensor,
    *,
    sizes: Sequence[int | float],
    policies: Sequence[str | Policy] | None = None,
    window_size: int = 32,
    attention_mask: Tensor | None = None,
    chunk: int = 64,
    batch_size: int = 4,
    progress: Callable[[str], None] = lambda _: None,
) -> PerplexityTable:
    """Score real continuations of contexts compressed to each cache size.

    Each context goes through the model once; each policy then chooses its keys, and the
    continuation is fed some tokens at a time, growing the cache. This measures exactly the choice
    after the prompt, and no eviction while decoding.

    Args:
        model: a causal language model of transformers.
        contexts: ``[N, S]`` token ids.
        continuations: ``[N, T]`` the tokens that really follow.
        sizes: cache sizes, tokens (int) or shares of the context (float).
        policies: names or policies; None for all but ``full``, which is always measured.
        window_size: number of newest keys, which always stay.
        attention_mask: ``[N, S]``, 0 at padding on the left.
        chunk: tokens to feed at once.
        batch_size: prompts to run together.
        progress: receives a line after each batch of prompts.

    Returns:
        The table.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> ids = torch.arange(80).view(2, 40) % 32
        >>> table = perplexity_by_cache_size(
        ...     LlamaForCausalLM(config), ids[:, :30], ids[:, 30:], sizes=[8, 1.0],
        ...     policies=["cake"], window_size=4,
        ... )
        >>> table.nats.shape, bool(abs(table.cost[:, 1]).max() < 1e-5)  # a full-size cache is exact
        ((1, 2, 2), True)
    """
    check_count("chunk", chunk, least=1)
    check_count("batch_size", batch_size, least=1)
    if (
        contexts.ndim != 2
        or continuations.ndim != 2
        or len(contexts) != len(continuations)
        or not continuations.shape[1]
    ):
        raise ValueError(
            f"contexts {tuple(contexts.shape)} and continuations {tuple(continuations.shape)}: "
            "give [N, S] and [N, T] token ids"
        )
    if policies is None:
        policies = [name for name in POLICIES if name != "full"]
    chosen = [policy_of(each) for each in policies]
    nats = np.zeros((len(chosen), len(sizes), len(contexts)))
    full, kept = np.zeros(len(contexts)), np.zeros((len(chosen), len(sizes)))
    for at in range(0, len(contexts), batch_size):
        part = slice(at, at + batch_size)
        mask = None if attention_mask is None else attention_mask[part]
        start = Prefill.of(model, contexts[part], mask, window_size)
        full[part] = _score(start, start.compressed("full", 1.0), continuations[part], chunk)
        for row, policy in enumerate(chosen):
            for column, size in enumerate(sizes):
                cache = start.compressed(policy, size, decode_eviction=False)
                held = sum(float((p >= 0).sum()) / p.shape[1] for p in cache.kept().values())
                share = held / (len(cache.layers) * sum(cache.lengths))
                kept[row, column] += share * len(contexts[part]) / len(contexts)
                nats[row, column, part] = _score(start, cache, continuations[part], chunk)
        progress(f"{min(at + batch_size, len(contexts))} of {len(contexts)} prompts")
    names = tuple(policy.name for policy in chosen)
    return PerplexityTable(
        names, tuple(sizes), nats, full, contexts.shape[1], continuations.shape[1], kept
    )


@torch.no_grad()
def _score(start: Prefill, cache: Any, continuation: Tensor, chunk: int) -> NDArray[np.float64]:
    """Return the mean negative log-probability of each continuation, ``[B]`` in nats."""
    with undisturbed(start.model), cache.attached():
        scored = follow(start.feed(), cache.key_values, start.logits, continuation, chunk)
    return -scored.cpu().double().mean(1).numpy()
