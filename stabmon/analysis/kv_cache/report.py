"""What a simulated cache holds, loses and preserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabmon.analysis.kv_cache.preservation import MEASURES
from stabmon.analysis.record import AnalysisRecord


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's numbers; B samples, H_kv key heads, S prompt positions, all tensors on the
    CPU.
    """

    layer: str
    """Qualified name of the module that attends."""
    dispersion: Tensor
    """``[B]`` D in nats, summed over query heads and window queries."""
    shift: Tensor
    """``[B]`` V, summed over query heads."""
    preference: Tensor
    """``[B]`` ``D^(1/tau1) V^(1/tau2)``; with both temperatures at 1 for other policies, which make
    no use of it.
    """
    budget: Tensor
    """``[B]`` int64 keys *before the window* that each key head may keep, on average over heads;
    the window's come on top.
    """
    scores: Tensor
    """``[B, H_kv, S]`` what each key is worth; NaN for keys in the window and padding."""
    kept: Tensor
    """``[B, H_kv, M]`` int64 positions after the prompt, ascending, the window's included; -1 in
    slots that stay empty.
    """
    preserved: Mapping[str, Mapping[str, Tensor]]
    """``preserved[choice][measure]`` is ``[B]``, see :data:`.preservation.MEASURES`; choices of as
    many keys in each head.
    """
    evicted_at: Tensor
    """``[B, H_kv, S + F]`` int32: the step at which a key went (0 the prompt, then 1 … F), -1 if it
    stayed, -2 for padding.

    F is the number of tokens that were fed after the prompt: all decoded tokens but the last.
    """

    def kept_at(self, step: int) -> Tensor:
        """Return which keys are held after a decoding step, ``[B, H_kv, S + F]`` bool; step 0 is
        the prompt.
        """
        positions = torch.arange(self.evicted_at.shape[-1])
        there = positions < self.scores.shape[-1] + step
        return there & ((self.evicted_at == -1) | (self.evicted_at > step))


@dataclass(frozen=True, eq=False)
class CakeReport:
    """Report the effect of one cache size on a prompt and the tokens that follow."""

    policy: str
    settings: Mapping[str, Any]
    """The policy's own parameters."""
    cache_size: int | float
    window_size: int
    layers: tuple[LayerCache, ...]
    left_out: Mapping[str, str]
    """Layers that keep their cache, and why."""
    lengths: tuple[int, ...]
    """Tokens of each sample's prompt, padding not counted."""
    sizes: tuple[int, ...]
    """Keys that each sample may keep in a layer, on average over layers."""
    stages: Tensor
    """``[L, L, B]`` int64: row m is the budgets after layer m's prefill under the cascade; -1 for
    layers still to come.
    """
    token_ids: Tensor
    """``[B, S]`` int64, or ``[0, 0]`` where the batch holds none."""
    tokens: Tensor
    """``[B, T]`` int64 tokens decoded with the compressed cache: the most likely ones, or the given
    continuation.
    """
    log_probabilities: Tensor
    """``[B, T]`` of these tokens, in nats, with the compressed cache."""
    full_log_probabilities: Tensor
    """``[B, T]`` of the same tokens with the full cache."""
    notes: tuple[str, ...] = field(default=())

    @property
    def decode_steps(self) -> int:
        """Tokens that were fed after the prompt: all decoded tokens but the last."""
        return max(0, self.tokens.shape[1] - 1)

    @property
    def compression_ratio(self) -> float:
        """Keys kept after the prompt over keys of the full cache, in (0, 1]; over samples, heads
        and the layers in ``layers``.
        """
        kept = sum(float((layer.kept >= 0).sum()) for layer in self.layers)
        heads = sum(layer.kept.shape[1] for layer in self.layers)
        return kept / (heads * sum(self.lengths))

    @property
    def eviction_frequency(self) -> float:
        """Share of (sample, layer, step) at which some key was evicted, in [0, 1]; the prompt is a
        step, then each token fed.
        """
        steps = 1 + self.decode_steps
        happened = 0
        for layer in self.layers:
            went = layer.evicted_at.flatten(1)
            happened += sum(int((went == step).any(1).sum()) for step in range(steps))
        return happened / (steps * len(self.layers) * len(self.lengths))

    @property
    def budget_use(self) -> float:
        """Keys kept after the prompt over keys that the cache size allows (never more than there
        are), in [0, 1].

        Below 1 where the allotment leaves keys unused, as ``published`` may.
        """
        allowed = sum(
            min(size, length) for size, length in zip(self.sizes, self.lengths, strict=True)
        )
        heads = sum(layer.kept.shape[1] for layer in self.layers)
        return sum(float((layer.kept >= 0).sum()) for layer in self.layers) / (heads * allowed)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability of ``tokens`` with the compressed cache; NaN
        where none were decoded.

        Of tokens that the model chose itself this is low by construction: it is meant to be held
        against ``full_perplexity``, or taken on a given continuation.
        """
        return float(torch.exp(-self.log_probabilities.mean()))

    @property
    def full_perplexity(self) -> float:
        """The same tokens' perplexity with the full cache."""
        return float(torch.exp(-self.full_log_probabilities.mean()))

    def to_record(self, perplexities: Any = None) -> AnalysisRecord:
        """Return the record of kind ``cake``.

        Values: ``policy``, ``settings``, ``cache_size``, ``window_size``, ``layers`` (names, in
            order), ``left_out``, ``lengths``,
        ``sizes``, ``steps`` (tokens fed after the prompt, F), ``compression_ratio``,
        ``eviction_frequency``, ``budget_use``, ``perplexity``, ``full_perplexity``, ``choices`` and
        ``measures`` (the axes of ``preserved``), ``notes``; with a table of perplexities also its
        own, see :meth:`.perplexity.PerplexityTable.entries`.

        Arrays (L layers, B samples): ``dispersion``, ``shift``, ``preference``, ``budget`` ``[L,
            B]``; ``preserved``
        ``[L, choices, measures, B]``; ``stages`` ``[L, L, B]``; ``token_ids`` ``[B, S]``;
        ``new_token_ids``, ``log_probabilities``, ``full_log_probabilities`` ``[B, T]``; for each
        layer ``scores/<layer>`` ``[B, H_kv, S]``, ``kept/<layer>`` ``[B, H_kv, M]`` and
        ``evicted_at/<layer>`` ``[B, H_kv, S + F]``, from which the keys held at any step follow,
        see :meth:`LayerCache.kept_at`.

        Args:
            perplexities: a :class:`.perplexity.PerplexityTable` to store beside.
        """
        names = [layer.layer for layer in self.layers]
        choices = list(self.layers[0].preserved)
        values: dict[str, Any] = {
            "policy": self.policy,
            "settings": dict(self.settings),
            "cache_size": self.cache_size,
            "window_size": self.window_size,
            "layers": names,
            "left_out": dict(self.left_out),
            "lengths": list(self.lengths),
            "sizes": list(self.sizes),
            "steps": self.decode_steps,
            "compression_ratio": self.compression_ratio,
            "eviction_frequency": self.eviction_frequency,
            "budget_use": self.budget_use,
            "perplexity": self.perplexity,
            "full_perplexity": self.full_perplexity,
            "choices": choices,
            "measures": list(MEASURES),
            "notes": list(self.notes),
        }
        arrays = {
            name: torch.stack([getattr(layer, name) for layer in self.layers]).numpy()
            for name in ("dispersion", "shift", "preference", "budget")
        }
        arrays["preserved"] = np.stack(
            [
                [[layer.preserved[choice][m].numpy() for m in MEASURES] for choice in choices]
                for layer in self.layers
            ]
        )
        arrays |= {
            "stages": self.stages.numpy(),
            "token_ids": self.token_ids.numpy(),
            "new_token_ids": self.tokens.numpy(),
            "log_probabilities": self.log_probabilities.numpy(),
            "full_log_probabilities": self.full_log_probabilities.numpy(),
        }
        for layer in self.layers:
            arrays[f"scores/{layer.layer}"] = layer.scores.numpy()
            arrays[f"kept/{layer.layer}"] = layer.kept.numpy()
            arrays[f"evicted_at/{layer.layer}"] = layer.evicted_at.numpy()
        if perplexities is not None:
            more_values, more_arrays = perplexities.entries()
            values |= more_values
            arrays |= more_arrays
        return AnalysisRecord("cake", values, arrays)
