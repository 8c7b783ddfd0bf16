"""A few gradients to check at every step: cheap, and enough to notice bad values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from stabmon._torch.tensors import local

_SMALL = 1 << 16
"""Largest number of values of a parameter that is checked in every step."""


class GradientProbe:
    """A few small parameters, the first and the last of the model.

    There a non-finite gradient arrives, and starts.

    Args:
        model: the model in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = self._choose()

    def gradients(self) -> list[Tensor]:
        """Return up to four gradients, of this rank's shards where they are sharded."""
        first = _first_two(self._parameters)
        if not first:  # what is trained has changed
            self._parameters = self._choose()
            first = _first_two(self._parameters)
        last = _first_two(reversed(self._parameters))
        return [*first, *(grad for grad in last if all(grad is not other for other in first))]

    def weights(self) -> list[Tensor]:
        """Return up to four parameters as they are now, or this rank's shards of them."""
        chosen = {id(each): each for each in (*self._parameters[:2], *self._parameters[-2:])}
        return [local(parameter.detach()) for parameter in chosen.values()]

    def _choose(self) -> list[nn.Parameter]:
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        small = [parameter for parameter in trainable if parameter.numel() <= _SMALL]
        return small or sorted(trainable, key=lambda parameter: parameter.numel())[:4]


def _first_two(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    found: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            found.append(local(parameter.grad))
            if len(found) == 2:
                break
    return found
