"""Compressed cache for transformers models: choice of keys, masks and evictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.analysis.kv_cache.budgets import check_cache
from stabmon.analysis.kv_cache.cache.masks import masked_arguments
from stabmon.analysis.kv_cache.cache.stock_cache import make_cache
from stabmon.analysis.kv_cache.cache.trace import Eviction, Stage
from stabmon.analysis.kv_cache.policy import DecodeStep, Policy, best, policy_of
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.analysis.kv_cache.sharing import Sharing
from stabmon.capture.function_mode import isolated
from stabmon.capture.intercept import AttentionSite, intercepted
from stabmon.operator.from_call import operator_of


class CompressedCache:
    """A cache of transformers' own kind with a part of the keys, and its history.

    Use it inside :meth:`attached`; outside, masks would cover evicted keys, and a forward raises an
    error.

    Args:
        model: a causal language model of transformers, with sdpa, eager or flex attention.
        policy: the eviction policy, a name or a :class:`~stabmon.analysis.kv_cache.policy.Policy`.
        cache_size: keys that each key head may keep on average over layers: tokens (int), or a
            share of each sample's prompt (float in (0, 1]). A sample no longer than this keeps all.
        window_size: number of newest keys, which always stay and whose queries judge the others; 2
            or more.
        cascade: shrink layers while the prompt goes through the model, else after its last layer.
        decode_eviction: evict while decoding too; None for the policy's published behaviour.

    Attributes:
        key_values: the model's ``past_key_values``.
        layers: layers that can lose keys, by index.
        left_out: reasons of the layers that keep their cache, by index.
        evictions: lost keys, in order.
        stages: the cache's size around each layer's turn in the prompt.
        lengths: tokens of each sample's prompt, padding not counted.
        sizes: keys that each sample may keep in a layer, on average over layers.
        step: forwards since the prompt.
        on_prompt: called with each layer's index and attention during the prompt.

    Raises:
        ValueError: for a model without such a cache, or values out of range.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
        >>> ids = torch.arange(30)[None]
        >>> cache = CompressedCache(model, policy="snapkv", cache_size=8, window_size=4)
        >>> with cache.attached(), torch.no_grad():
        ...     _ = model(ids, past_key_values=cache.key_values)
        ...     output = model(ids[:, :3], past_key_values=cache.key_values)  # from position 30 on
        >>> cache.kept()["transformer.h.0.attn"].shape, cache.key_values.get_seq_length()
        (torch.Size([1, 2, 11]), 33)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        policy: str | Policy = "cake",
        cache_size: int | float,
        window_size: int = 32,
        cascade: bool = True,
        decode_eviction: bool | None = None,
    ) -> None:
        check_cache(cache_size, window_size)
        self.model, self.policy = model, policy_of(policy)
        self.cache_size, self.window_size, self.cascade = cache_size, window_size, cascade
        evicts = self.policy.evicts_in_decode if decode_eviction is None else decode_eviction
        self.decode_eviction = evicts
        self.key_values, self.layers, self.left_out = make_cache(model)
        self.evictions: list[Eviction] = []
        self.stages: list[Stage] = []
        self.lengths: list[int] = []
        self.sizes: list[int] = []
        self.step = -1
        self.on_prompt: Callable[[int, PromptLayer], None] | None = None
        self._names: dict[int, str] = {}
        self._limits: dict[int, Tensor] = {}
        self._budgets: dict[int, np.ndarray] = {}
        self._sharing: Sharing | None = None
        self._attached = False
        self._pending: int | None = None
        self._keys_are_shared = any("another layer" in why for why in self.left_out.values())
        for index, layer in self.layers.items():
            layer.ready = functools.partial(self._about_to_use, index)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model run with this cache, in evaluation mode.

        The model is afterwards as it was.
        """
        if self._attached:
            yield
            return
        flags = [(module, module.training) for module in self.model.modules()]
        with ExitStack() as stack:
            stack.enter_context(intercepted(self.model, self._attend))
            stack.callback(self.model.register_forward_pre_hook(lambda *_: self._begin()).remove)
            stack.callback(self.model.register_forward_hook(lambda *_: self._end()).remove)
            self._attached = True
            try:
                self.model.eval()
                yield
            finally:
                self._attached = False
                self._pending = None
                for module, training in flags:
                    module.training = training

    def kept(self) -> dict[str, Tensor]:
        """Return the positions held by each layer, ``[B, H_kv, M]`` ascending.

        Empty slots are -1.
        """
        return {self._names[index]: self.layers[index].held_positions() for index in self._names}

    def budgets(self) -> dict[str, np.ndarray]:
        """Return each layer's number of keys before the window, ``[B]`` int64."""
        return {self._names[index]: budget for index, budget in self._budgets.items()}

    def held_bytes(self) -> int:
        """Return the bytes of all keys and values in ``layers``, empty slots included."""
        held = [layer for layer in self.layers.values() if layer.keys is not None]
        return sum(part.nbytes for layer in held for part in (layer.keys, layer.values))

    def _begin(self) -> None:
        self.step += 1

    def _end(self) -> None:
        if self._pending is not None:
            self._refuse_unseen()

    def _refuse_unseen(self) -> None:
        index, self._pending = self._pending, None
        raise ValueError(
            f"layer {index} of {type(self.model).__name__} attends in a way that takes no mask of "
            "the missing keys: load the model with attn_implementation='sdpa', or give one that "
            "uses transformers' attention interface"
        )

    def _about_to_use(self, index: int) -> None:
        if not self._attached:
            raise RuntimeError(
                "a compressed cache is used outside of `with cache.attached():`; move the call "
                "inside"
            )
        if self._pending is not None:
            self._refuse_unseen()
        self._pending = index

    def _attend(self, site: AttentionSite) -> Any:
        """Run one attention call with the right mask, then evict keys of its layer."""
        index = self._layer_of(site)
        if index is None:
            return site.run()
        layer, is_own = self.layers[index], self._pending == index
        if is_own:
            self._pending = None
        _, positions, has_gaps = layer.handed
        if index not in self._names:
            result = site.run()
            with isolated():
                attention = operator_of(replace(site.read(), is_self=True))
                heads = layer.keys.shape[1]
                self.take_prompt(index, PromptLayer(site.layer, attention, heads, self.window_size))
        else:
            changes: dict[str, Any] = {}
            if positions is not None:
                changes = masked_arguments(site, positions, layer.seen, has_gaps=has_gaps)
            result = site.run(**changes)
            if is_own:  # else a layer that shares these keys, which have been judged already
                with isolated():
                    self._after_step(index, site, changes)
        if not self._keys_are_shared:
            layer.handed = None  # else it would keep evicted keys alive
        return result

    def _layer_of(self, site: AttentionSite) -> int | None:
        """Return the index of the layer behind a call's keys, or None.

        Found by the tensor itself, else by the module's own index and the number of keys.
        """
        key = site.arguments["key"]
        for index, layer in self.layers.items():
            if layer.handed is not None and layer.handed[0] is key:
                return index
        own = getattr(site.module, "layer_idx", None)
        layer = self.layers.get(own) if isinstance(own, int) else None
        if layer is None or layer.handed is None or layer.handed[0].shape[-2] != key.shape[-2]:
            return None
        return own

    def accept(self, index: int) -> None:
        """Mark a layer's keys as used in full without an attention call."""
        self._pending, self.layers[index].handed = None, None

    def take_prompt(self, index: int, prompt: PromptLayer) -> None:
        """Let a layer lose keys after its prompt; it must hold the whole prompt's keys.

        Args:
            index: the layer's index.
            prompt: the layer's attention over the prompt.

        Raises:
            ValueError: if the layer is not causal, or the cache has no room beside the window.
        """
        layer, window = self.layers[index], self.window_size
        prompt.check()
        self._names[index] = prompt.name
        if self.on_prompt is not None:
            self.on_prompt(index, prompt)
        if self._sharing is None:
            self._sharing = Sharing(
                self.policy, prompt.lengths, self.cache_size, window, len(self.layers)
            )
            self.lengths, self.sizes = self._sharing.lengths, self._sharing.sizes
        if self.policy.keeps_all:
            return
        before = self.held_bytes()
        layer.memory = {
            "_score": self.policy.scores(prompt),
            "_before": self._per_head(prompt.before, prompt),
            "_window": self._per_head(prompt.in_window, prompt),
            **self.policy.remember(prompt),
        }
        order = list(self._names)
        for place, budget in self._sharing.add(prompt, at_once=self.cascade).items():
            self._shrink(order[place], budget)
        self.stages.append(Stage(prompt.name, before, self.held_bytes()))
        if len(self._names) == len(self.layers):
            self._settle()

    @staticmethod
    def _per_head(flags: Tensor, prompt: PromptLayer) -> Tensor:
        return flags[:, None].expand(-1, prompt.key_heads, -1)

    def _shrink(self, index: int, budget: np.ndarray) -> None:
        layer, self._budgets[index] = self.layers[index], budget
        candidates = layer.memory["_before"] & (layer.held_positions() >= 0)
        allowed = torch.from_numpy(budget).to(candidates.device)
        chosen = self.policy.choose(layer.memory["_score"], allowed, candidates)
        self._note(index, layer.keep(chosen | layer.memory["_window"]), step=0)

    def _settle(self) -> None:
        """Clear the prompt's memory after its last layer, and fix each head's limit."""
        sizes = torch.tensor(self.sizes)
        whole = sizes >= torch.tensor(self.lengths)
        for index, layer in self.layers.items():
            layer.memory = {
                name: known for name, known in layer.memory.items() if not name.startswith("_")
            }
            held = (layer.held_positions() >= 0).sum(-1)
            self._limits[index] = torch.where(
                whole.to(held.device)[:, None], sizes.to(held.device)[:, None], held
            )

    def _after_step(self, index: int, site: AttentionSite, changes: dict[str, Any]) -> None:
        if not self.decode_eviction or self.policy.keeps_all:
            return
        layer, limit = self.layers[index], self._limits[index]
        positions = layer.held_positions()
        held = positions >= 0
        full = bool((held.sum(-1) > limit).any())
        if not full and not self.policy.follows:
            return
        step = DecodeStep(
            operator_of(site.read(**changes)), positions, self.window_size, layer.memory
        )
        scores = self.policy.step_scores(step)
        if full:
            slots = torch.arange(positions.shape[-1], device=positions.device)
            safe_slots = limit.clamp(max=self.window_size)
            safe = held & (slots >= positions.shape[-1] - safe_slots[..., None])
            self._note(
                index,
                layer.keep(safe | best(scores, limit - safe_slots, held & ~safe)),
                step=self.step,
            )

    def _note(self, index: int, dropped: Tensor, *, step: int) -> None:
        most = int((dropped >= 0).sum(-1).max())
        if most:
            lost = dropped.sort(-1).values[..., -most:].cpu().numpy()
            self.evictions.append(Eviction(step, self._names[index], lost))
