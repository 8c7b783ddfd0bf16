"""Caches of transformers' own class with removable keys in full-attention layers.

No other file of this package names transformers. Checked with transformers 5.23:
``DynamicCache(config=…)`` chooses a class for each layer, and a model calls nothing of a layer but
``update``, ``get_seq_length`` and ``get_mask_sizes``. If that changes,
tests/analysis/kv_cache/test_cache.py fails.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import undisturbed
from stabmon.analysis.kv_cache.cache.layer import KeptKeys


@functools.cache
def layer_class() -> type[Any]:
    """Return the class of a layer with removable keys."""
    from transformers.cache_utils import DynamicLayer

    return type("CompressedLayer", (KeptKeys, DynamicLayer), {"__doc__": KeptKeys.__doc__})


def check_decoder(model: nn.Module) -> None:
    """Raise an error for a model without token-by-token generation from one sequence.

    Raises:
        ValueError: for encoders, encoder–decoders, and models of other libraries.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder–decoder: its prompt is in the encoder, which has no KV cache; "
            "give a decoder"
        )
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        raise ValueError(
            f"{name} does not generate from a KV cache: give a causal language model of "
            "transformers"
        )


def make_cache(model: nn.Module) -> tuple[Any, dict[int, Any], dict[int, str]]:
    """Make an empty cache for a model.

    Args:
        model: a decoder of transformers.

    Returns:
        The cache (a ``DynamicCache``), its layers that can lose keys, and the reasons of the
        others, both by the layer's index.

    Raises:
        ValueError: if no layer can lose keys, or the model has no such cache.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    check_decoder(model)
    config: Any = model.config
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    if not cache.layers:
        raise ValueError(
            f"{type(model).__name__} has no layers in its config: set num_hidden_layers there"
        )
    shrinking, left_out = {}, {}
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            shrinking[index] = cache.layers[index] = layer_class()()
        else:
            left_out[index] = reason(layer)
    if not shrinking:
        reasons = ", ".join(sorted(set(left_out.values())))
        raise ValueError(
            f"{type(model).__name__} has no layer whose cache grows with the text ({reasons}): "
            "there is nothing to evict"
        )
    return cache, shrinking, left_out


def left_out_layers(model: nn.Module) -> dict[int, str]:
    """Return the reasons of layers with an uncompressed cache, by index.

    Empty for models of other libraries than transformers.

    Raises:
        ValueError: for an encoder–decoder.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        check_decoder(model)
    if not hasattr(config, "get_text_config"):
        return {}
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return {
        index: reason(layer)
        for index, layer in enumerate(layers)
        if type(layer) is not DynamicLayer
    }


def cached_heads(model: nn.Module, input_ids: Tensor | None) -> dict[int, int]:
    """Return the number of heads in each layer's cache.

    Found by a forward of one token.

    Empty for models without such a cache.

    Args:
        model: the model.
        input_ids: ``[B, S]``, or None.
    """
    try:
        check_decoder(model)
    except ValueError:
        return {}
    if input_ids is None or 0 in input_ids.shape:
        return {}
    with undisturbed(model), torch.no_grad():
        layers = model(input_ids=input_ids[:1, :1], use_cache=True).past_key_values.layers
    held = {index: getattr(layer, "keys", None) for index, layer in enumerate(layers)}
    return {
        index: keys.shape[1]
        for index, keys in held.items()
        if isinstance(keys, Tensor) and keys.ndim == 4
    }


def reason(layer: Any) -> str:
    """Describe in a few words an unchanged layer's kind of cache."""
    if getattr(layer, "is_sliding", False):
        return f"a sliding window of {layer.sliding_window} keys"
    # class names of transformers.cache_utils; an unknown one is named as it is
    known = {
        "LinearAttentionLayer": "a state instead of keys",
        "DummyLayer": "another layer's keys",
    }
    return known.get(type(layer).__name__, f"a cache of its own kind ({type(layer).__name__})")
