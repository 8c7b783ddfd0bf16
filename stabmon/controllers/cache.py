"""A key's bias is remembered in the model's own cache, as features of the key: so it is cropped,
reordered and windowed with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stabmon.controllers.call import ControlledCall


class RememberingCache:
    """Stands for a cache of transformers while one controlled module is called; everything but
    ``update`` is the cache's own.

    Args:
        cache: the cache.
        call: the call, which knows the biases of the new keys.
    """

    def __init__(self, cache: Any, call: ControlledCall) -> None:
        self._cache = cache
        self._call = call

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the cache's own; ``key`` is ``[B, H_kv, S, D]`` of the new tokens, what is given back
        is of all.

        Raises:
            ValueError: if the cache holds keys that came without biases.
        """
        self._make_room(layer, key)
        return self._call.remember(self._cache, key, value, (layer, *args), kwargs)

    @property
    def self_attention_cache(self) -> RememberingCache:
        """Of an encoder-decoder's two caches, the one of the tokens of this call."""
        return RememberingCache(self._cache.self_attention_cache, self._call)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Models ask what kind of cache they are given."""
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
        known.is_initialized = (
            False  # laid out ahead for keys without biases: laid out again by the update
        )


def is_cache(value: object) -> bool:
    """Whether an argument of an attention module is a cache of keys and values."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")
