"""One call of a controlled attention module, with its biases and gains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabmon.controllers.base import Controller
from stabmon.controllers.features import biases, key_features


class ControlledCall:
    """The controller's numbers for one call, kept until the module returns.

    B batch, H query heads, S tokens, K keys, D width.

    Args:
        controller: the module's.
        hidden: ``[B, S, D]`` hidden states that the module was called with.
    """

    def __init__(self, controller: Controller, hidden: Tensor) -> None:
        self.controller = controller
        self.new_bias: Tensor | None = controller.key_bias(hidden)
        """``[B, H, S]`` of the tokens of this call."""
        self.gain: Tensor | None = controller.query_gain(hidden)
        """``[B, H, S]`` of the queries."""
        self._remembered: tuple[Tensor, Tensor] | None = None

    def bias(self, key: Tensor) -> Tensor | None:
        """Return each key's bias ``[B, H, K]``, also of earlier calls; None for none.

        Raises:
            ValueError: if ``key`` ``[B, H_kv, K, D]`` are not the tokens of this call, and no cache
                holds their biases.
        """
        if self._remembered is not None:
            features = self._remembered[1][..., self._remembered[0].shape[-1] :]
            return biases(features, self.controller.site.heads)
        if self.new_bias is not None and self.new_bias.shape[-1] != key.shape[2]:
            raise ValueError(
                f"{self.controller.site.name} attends to {key.shape[2]} keys, but was called with "
                f"{self.new_bias.shape[-1]} tokens: a key bias needs self-attention, so leave this "
                "module out with layers=[...], or use form='query_gain'"
            )
        return self.new_bias

    def with_features(self, key: Tensor) -> Tensor | None:
        """Return the keys with their biases as features, ``[B, H_kv, K, D + F]``.

        None where there are no biases.
        """
        if self._remembered is not None and self._remembered[0] is key:
            return self._remembered[1]
        bias = self.bias(key)
        if bias is None:
            return None
        return torch.cat((key, key_features(bias, key.shape[1], key.dtype)), dim=-1)

    def remember(
        self, cache: Any, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Update a cache with keys that carry their biases.

        Args:
            cache: the cache.
            key: ``[B, H_kv, S, D]`` of the new tokens.
            value: ``[B, H_kv, S, E]`` of the new tokens.
            args: further arguments of the cache's update.
            kwargs: further arguments of the cache's update.

        Returns:
            All keys without biases, and all values.
        """
        assert self.new_bias is not None
        features = key_features(self.new_bias, key.shape[1], key.dtype)
        keys, values = cache.update(torch.cat((key, features), dim=-1), value, *args, **kwargs)
        plain = keys[..., : key.shape[-1]]
        self._remembered = plain, keys
        return plain, values
