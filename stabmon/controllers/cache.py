"""Biases of keys in the model's own cache, as features of the keys.

So they are cropped, reordered and windowed with them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stabmon.controllers.call import ControlledCall


class RememberingCache:
    """A cache of transformers as one controlled module is given it.

    Everything but ``update`` is the cache's own.

    Args:
        cache: the cache.
        call: the call, with the biases of the new keys.
    """

    def __init__(self, cache: Any, call: ControlledCall) -> None:
        self._cache = cache
        self._call = call

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values, and return those of all tokens.

        Args:
            key: ``[B, H_kv, S, D]``.
            value: ``[B, H_kv, S, E]``.
            layer: place of the layer in the cache.
            args: as for the cache's own.
            kwargs: as for the cache's own.

        Returns:
            Keys ``[B, H_kv, K, D]`` and values ``[B, H_kv, K, E]``.

        Raises:
            ValueError: if the cache holds keys that came without biases.
        """
        self._make_room(layer, key)
        return self._call.remember(self._cache, key, value, (layer, *args), kwargs)

    @property
    def self_attention_cache(self) -> RememberingCache:
        """The cache of this call's tokens, of an encoder-decoder's two."""
        return RememberingCache(self._cache.self_attention_cache, self._call)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The cache's own class, which models test for."""
        return type(self._cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __len__(self) -> int:
        return len(self._cache)

    def _make_room(self, layer: int, key: Tensor) -> None:
        layers = self._cache.layers
        known = layers[layer] if layer < len(layers) else None
        if (
            known is None
            or not known.is_initialized
            or known.keys is None
            or known.keys.shape[-1] != key.shape[-1]
        ):
            return
        if known.keys.numel() and int(known.get_seq_length()):
            raise ValueError(
                "this cache was filled before controllers were attached, so that the biases of "
                "its keys are unknown: start with a new one"
            )
        # laid out ahead for keys without biases: the update lays it out again
        known.is_initialized = False


def is_cache(value: object) -> bool:
    """Return True if an argument of an attention module is a cache of keys and values."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")
