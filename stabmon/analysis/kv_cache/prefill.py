"""One prompt's prefill, shared by any number of compressed caches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import undisturbed
from stabmon.analysis.kv_cache.cache.compressed import CompressedCache
from stabmon.analysis.kv_cache.cache.decode import Feed
from stabmon.analysis.kv_cache.policy import Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer


@dataclass(frozen=True, eq=False)
class Prefill:
    """Keys, values and attention of a batch of prompts.

    Holds queries and keys of all layers, linear in the length.
    """

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor | None
    window_size: int
    logits: Tensor
    """``[B, 1, V]`` of each prompt's last token."""
    layers: dict[int, PromptLayer]
    cache: CompressedCache
    """The full cache."""

    @classmethod
    def of(
        cls, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, window_size: int
    ) -> Prefill:
        """Run the prompts once and keep every layer's queries and keys.

        Args:
            model: a causal language model of transformers.
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding on the left, or None.
            window_size: number of newest keys, which always stay, in the caches to be made.
        """
        cache = CompressedCache(model, policy="full", cache_size=1.0, window_size=window_size)
        layers: dict[int, PromptLayer] = {}
        cache.on_prompt = layers.__setitem__
        feed = Feed(model, input_ids, attention_mask)
        with undisturbed(model), cache.attached(), torch.no_grad():
            logits = feed(input_ids, cache.key_values, keep=1)[:, -1:]
        cache.on_prompt = None
        return cls(model, input_ids, attention_mask, window_size, logits, layers, cache)

    def compressed(
        self, policy: str | Policy, cache_size: int | float, **settings: Any
    ) -> CompressedCache:
        """Make a cache after the prompt, with the keys chosen by a policy.

        Args:
            policy, cache_size, settings: see :class:`CompressedCache`.
        """
        made = CompressedCache(
            self.model,
            policy=policy,
            cache_size=cache_size,
            window_size=self.window_size,
            **settings,
        )
        with made.attached(), torch.no_grad():
            for index, source in enumerate(self.cache.key_values.layers):
                if index not in made.layers:
                    made.key_values.layers[index] = copy.deepcopy(source)
            for index, prompt in self.layers.items():
                source = self.cache.layers[index]
                made.layers[index].update(source.keys, source.values)
                made.take_prompt(index, prompt)
                made.accept(index)
        made.step = 0
        return made

    def feed(self) -> Feed:
        """Return a :class:`Feed` positioned after the prompt."""
        feed = Feed(self.model, self.input_ids, self.attention_mask)
        feed.seen = self.input_ids.shape[1]
        return feed
