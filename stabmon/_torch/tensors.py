"""Sharded tensors, and tensors inside nested values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return True if only a part of the tensor is here (a DTensor)."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, without communication with other ranks."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, mappings and model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def without_graph(value: Any) -> Any:
    """Return the same with every tensor detached.

    Anything but a tensor and a plain tuple, list or dict of them stays as it is.

    Example:
        >>> import torch
        >>> (out,) = without_graph((torch.ones(1, requires_grad=True) * 2,))
        >>> out.requires_grad
        False
    """
    if isinstance(value, Tensor):
        return value.detach() if value.grad_fn is not None else value
    if type(value) in (tuple, list):
        return type(value)(without_graph(each) for each in value)
    if type(value) is dict:
        return {name: without_graph(each) for name, each in value.items()}
    return value
