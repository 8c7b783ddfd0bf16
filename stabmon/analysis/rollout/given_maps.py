"""Given attention maps as layers of a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stabmon.analysis.rollout.mixing import SampleMaps
from stabmon.analysis.rollout.paths import Layer


def given_layers(maps: Sequence[Any]) -> Iterator[Layer]:
    """Yield one layer for each map.

    Args:
        maps: first layer first; ``[B, H, S, S]``, ``[B, S, S]`` with the heads fused already, or
            ``[S, S]`` of one sample.

    Raises:
        ValueError: naming the map, if it is none of these or differs from the others.
    """
    if not maps:
        raise ValueError("no attention maps: give one a layer, first layer first")
    tensors = [_tensor(each, index) for index, each in enumerate(maps)]
    batch = max((len(each) for each in tensors if each.ndim == 4), default=0)
    laid_out = [_four(each, batch) for each in tensors]
    for index, each in enumerate(laid_out):
        first = laid_out[0]
        if (len(each), each.shape[-1]) != (len(first), first.shape[-1]):
            raise ValueError(
                f"map {index} is of {len(each)} x {each.shape[-1]} tokens and map 0 of "
                f"{len(first)} x {first.shape[-1]}: give maps of the same batch and tokens"
            )
        yield _layer(each, index)


def is_given(model: Any) -> bool:
    """Return whether the argument is a list of maps, not a model."""
    return isinstance(model, list | tuple) and not any(
        callable(getattr(each, "forward", None)) for each in model
    )


def _tensor(given: Any, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"map {index} is a {type(given).__name__}: give a tensor or array"
        ) from None
    if tensor.ndim not in (2, 3, 4) or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() == 0:
        raise ValueError(
            f"map {index} has shape {list(tensor.shape)}: give [B, H, S, S], [B, S, S] or [S, S]"
        )
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _four(tensor: Tensor, batch: int) -> Tensor:
    """Return the map as ``[B, H, S, S]``.

    Beside maps of one sample, three dimensions are that sample's heads.
    """
    if tensor.ndim == 3 and batch == 1 and len(tensor) != 1:
        return tensor[None]
    if tensor.ndim == 3:
        return tensor[:, None]
    return tensor[None, None] if tensor.ndim == 2 else tensor


def _layer(weights: Tensor, index: int) -> Layer:
    batch, heads, tokens = weights.shape[:3]

    def maps(sample: int) -> tuple[SampleMaps, Tensor]:
        own = weights[sample]
        places = torch.arange(tokens, device=own.device)
        last_seen = torch.where(own.amax(0) != 0, places, -1).amax(-1).tolist()
        seen = slice(0, tokens)

        def block(rows: slice) -> tuple[slice, Tensor]:
            return seen, own[:, rows]

        def end(start: int, stop: int) -> int:
            return int(max(last_seen[start:stop])) + 1

        return SampleMaps(tokens, tokens, heads, block, end), (own != 0).any(-1).any(0)

    return Layer(f"map {index}", "self", batch, tokens, tokens, maps, weights.device, weights.dtype)
