"""Report of a simulated cache: held keys, losses and preserved attention."""

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
    """One layer's numbers, all tensors on the CPU.

    B samples, H_kv key heads, S prompt positions.

    Example:
        >>> from stabmon.analysis import simulate_cache
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.arange(12)[None]
        >>> report = simulate_cache(model, ids, policy="recency", cache_size=8, window_size=2)
        >>> report.layers[0].kept_at(0)[0, 0].nonzero()[:, 0].tolist()
        [0, 1, 2, 3, 8, 9, 10, 11]
    """

    layer: str
    """Qualified name of the attending module."""
    dispersion: Tensor
    """Dispersion D in nats, ``[B]``, summed over query heads and window queries."""
    shift: Tensor
    """Shift V, ``[B]``, summed over query heads."""
    preference: Tensor
    """Claim on the cache, ``[B]``: ``D^(1/tau1) V^(1/tau2)``.

    Policies with fixed claims make no use of it; for these both temperatures are 1.
    """
    budget: Tensor
    """Keys *before the window* per key head, ``[B]`` int64, on average over heads.

    The window's keys come on top.
    """
    scores: Tensor
    """Worth of each key, ``[B, H_kv, S]``; NaN for keys in the window and padding."""
    kept: Tensor
    """Positions after the prompt, the window's included: ``[B, H_kv, M]``, ascending.

    int64; empty slots are -1.

    Empty slots are -1.
    """
    preserved: Mapping[str, Mapping[str, Tensor]]
    """Preserved attention, ``preserved[choice][measure]`` ``[B]``.

    The measures are :data:`.preservation.MEASURES`; all choices keep as many keys in each head.
    """
    evicted_at: Tensor
    """Step of each key's eviction, ``[B, H_kv, S + F]`` int32.

    0 is the prompt, then 1 … F; -1 if the key stayed, -2 for padding.

    F is the number of tokens fed after the prompt: all decoded tokens but the last.
    """

    def kept_at(self, step: int) -> Tensor:
        """Return the keys held after a decoding step, ``[B, H_kv, S + F]`` bool.

        Step 0 is the prompt.
        """
        positions = torch.arange(self.evicted_at.shape[-1])
        there = positions < self.scores.shape[-1] + step
        return there & ((self.evicted_at == -1) | (self.evicted_at > step))


@dataclass(frozen=True, eq=False)
class CakeReport:
    """Effect of one cache size on a prompt and the tokens after it.

    Example:
        >>> from stabmon.analysis import simulate_cache
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.arange(12)[None]
        >>> report = simulate_cache(model, ids, policy="recency", cache_size=6, window_size=2)
        >>> report.compression_ratio, report.budget_use, report.eviction_frequency
        (0.5, 1.0, 1.0)
    """

    policy: str
    settings: Mapping[str, Any]
    """Parameters of the policy."""
    cache_size: int | float
    window_size: int
    layers: tuple[LayerCache, ...]
    left_out: Mapping[str, str]
    """Layers with an uncompressed cache, and the reason for each."""
    lengths: tuple[int, ...]
    """Tokens of each sample's prompt, padding not counted."""
    sizes: tuple[int, ...]
    """Keys for each sample in a layer, on average over layers."""
    stages: Tensor
    """Budgets under the cascade, ``[L, L, B]`` int64; row m: after layer m's prefill.

    Entries of layers still to come are -1.
    """
    token_ids: Tensor
    """Token ids ``[B, S]`` int64, or ``[0, 0]`` for a batch without any."""
    tokens: Tensor
    """Tokens decoded with the compressed cache, ``[B, T]`` int64.

    They are the most likely ones, or the given continuation.
    """
    log_probabilities: Tensor
    """Log-probabilities of ``tokens`` with the compressed cache, ``[B, T]`` in nats."""
    full_log_probabilities: Tensor
    """Log-probabilities of ``tokens`` with the full cache, ``[B, T]`` in nats."""
    notes: tuple[str, ...] = field(default=())

    @property
    def decode_steps(self) -> int:
        """Return the number of tokens fed after the prompt: all decoded ones but the last."""
        return max(0, self.tokens.shape[1] - 1)

    @property
    def compression_ratio(self) -> float:
        """Compute keys kept after the prompt over keys of the full cache, in (0, 1].

        Both are over samples, heads and the layers in ``layers``.
        """
        return self._kept_per_head / sum(self.lengths)

    @property
    def _kept_per_head(self) -> float:
        """Return the keys kept after the prompt over all samples, averaged over heads."""
        kept = sum(float((layer.kept >= 0).sum()) for layer in self.layers)
        return kept / sum(layer.kept.shape[1] for layer in self.layers)

    @property
    def eviction_frequency(self) -> float:
        """Compute the share of steps with an eviction, in [0, 1].

        The steps are over samples and layers; the prompt is a step, then each token fed.
        """
        steps = 1 + self.decode_steps
        happened = 0
        for layer in self.layers:
            went = layer.evicted_at.flatten(1)
            happened += sum(int((went == step).any(1).sum()) for step in range(steps))
        return happened / (steps * len(self.layers) * len(self.lengths))

    @property
    def budget_use(self) -> float:
        """Compute keys kept after the prompt over keys allowed by the cache size.

        In [0, 1]; no more keys are allowed than there are. Below 1 if the allotment leaves keys
        unused, as ``published`` may.
        """
        allowed = sum(min(pair) for pair in zip(self.sizes, self.lengths, strict=True))
        return self._kept_per_head / allowed

    @property
    def perplexity(self) -> float:
        """Compute the perplexity of ``tokens`` with the compressed cache; NaN without any.

        The perplexity of the model's own choices is low by construction: compare it with
        ``full_perplexity``, or take it on a given continuation.
        """
        return float(torch.exp(-self.log_probabilities.mean()))

    @property
    def full_perplexity(self) -> float:
        """Compute the perplexity of the same tokens with the full cache."""
        return float(torch.exp(-self.full_log_probabilities.mean()))

    def to_record(self, perplexities: Any = None) -> AnalysisRecord:
        """Return the record of kind ``cake``.

        Values: ``policy``, ``settings``, ``cache_size``, ``window_size``, ``layers`` (names, in
        order), ``left_out``, ``lengths``, ``sizes``, ``steps`` (tokens fed after the prompt, F),
        ``compression_ratio``, ``eviction_frequency``, ``budget_use``, ``perplexity``,
        ``full_perplexity``, ``choices`` and ``measures`` (the axes of ``preserved``), ``notes``;
        with a table of perplexities also its own, see :meth:`.perplexity.PerplexityTable.entries`.

        Arrays (L layers, B samples): ``dispersion``, ``shift``, ``preference``, ``budget`` ``[L,
        B]``; ``preserved`` ``[L, choices, measures, B]``; ``stages`` ``[L, L, B]``; ``token_ids``
        ``[B, S]``; ``new_token_ids``, ``log_probabilities``, ``full_log_probabilities`` ``[B, T]``;
        for each layer ``scores/<layer>`` ``[B, H_kv, S]``, ``kept/<layer>`` ``[B, H_kv, M]`` and
        ``evicted_at/<layer>`` ``[B, H_kv, S + F]``, from which the keys held at any step follow,
        see :meth:`LayerCache.kept_at`.

        Args:
            perplexities: a :class:`.perplexity.PerplexityTable` to store beside, or None.
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
            for name in ("scores", "kept", "evicted_at"):
                arrays[f"{name}/{layer.layer}"] = getattr(layer, name).numpy()
        if perplexities is not None:
            more_values, more_arrays = perplexities.entries()
            values |= more_values
            arrays |= more_arrays
        return AnalysisRecord("cake", values, arrays)
