"""Gradients before an optimizer step: when they are ready, their norms, and a cheap look at whether they are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture import clean_name

_SMALL = 1 << 16
"""Parameters of at most this many values can be looked at in every step."""


def gradient_norms(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """L2 norm of the gradient of each attention module's own parameters, and of all parameters under ``""``.

    Empty without gradients, and where they are sparse or sharded. One transfer to the host.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    if not gradients or any(is_sharded(grad) or grad.is_sparse for _, grad in gradients):
        return {}
    with torch.no_grad():
        norms = torch._foreach_norm([grad for _, grad in gradients])
        one_device = len({norm.device for norm in norms}) == 1
        values = torch.stack(norms if one_device else [norm.to(norms[0].device) for norm in norms]).tolist()
    squares = {id(parameter): value * value for (parameter, _), value in zip(gradients, values, strict=True)}
    found = {"": math.sqrt(sum(squares.values()))}
    for layer, module in layers.items():
        own = [squares[id(parameter)] for parameter in module.parameters() if id(parameter) in squares]
        if own:
            found[clean_name(layer)] = math.sqrt(sum(own))
    return found


class Sentinels:
    """A few small parameters, the first and the last of the model: where a non-finite gradient arrives, and where it starts."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = self._choose()

    def gradients(self) -> list[Tensor]:
        """Up to four gradients, of this rank's shards where they are sharded."""
        first = _first_two(self._parameters)
        if not first:  # what is trained has changed
            self._parameters = self._choose()
            first = _first_two(self._parameters)
        last = _first_two(reversed(self._parameters))
        return [*first, *(grad for grad in last if all(grad is not other for other in first))]

    def weights(self) -> list[Tensor]:
        """Up to four parameters as they are now, of this rank's shards where they are sharded."""
        chosen = {id(each): each for each in (*self._parameters[:2], *self._parameters[-2:])}
        return [local(parameter.detach()) for parameter in chosen.values()]

    def _choose(self) -> list[nn.Parameter]:
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        small = [parameter for parameter in trainable if parameter.numel() <= _SMALL]
        return small or sorted(trainable, key=lambda parameter: parameter.numel())[:4]


def is_sharded(tensor: Tensor) -> bool:
    """Whether only a part of the tensor is here (a DTensor)."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without a word to other ranks."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def _first_two(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    found: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            found.append(local(parameter.grad))
            if len(found) == 2:
                break
    return found


class AfterBackward:
    """Calls ``tell()`` each time a backward through one of the outputs it follows has come to its end, before any clipping.

    Under DDP gradients are summed over ranks by then. What ``tell`` raises is its to handle; it must not raise.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._waiting = False

    def follow(self, output: Any) -> None:
        """Wait for the backward of a forward's output; nothing where no tensor of it was computed from what is trained."""
        self._waiting = False
        tensor = next((each for each in tensors_in(output) if each.grad_fn is not None), None)
        if tensor is not None:
            tensor.register_hook(self._begun)

    def _begun(self, _: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            _queue(lambda: _queue(self._ended))  # twice, to come after what DDP queues in the meantime

    def _ended(self) -> None:
        self._waiting = False
        self._tell()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def _queue(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
