"""Losses in the outputs of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from stabmon._torch.tensors import tensors_in


def loss_in(output: Any) -> Tensor | None:
    """Find the loss in a forward's output, by its name or its gradients.

    Args:
        output: a tensor, mapping, sequence or dataclass; the loss is a single number in it.

    Returns:
        The number called ``loss``, else the one whose name holds ``total`` and ``loss``, else the
        only one whose name holds ``loss``, else the only one that gradients reach (the only one
        without a name, where they reach nothing); each time only among those that gradients reach,
        if there are such. None where several would do: a wrong loss is worse than none.

    Example:
        >>> import torch
        >>> loss_in({"logits": torch.zeros(2, 3), "loss": torch.tensor(1.5)})
        tensor(1.5000)
    """
    numbers = list(_numbers_in(output))
    reached = [(name, number) for name, number in numbers if number.requires_grad]
    among = reached or numbers
    names = [name.lower() for name, _ in among]
    for fits in (
        lambda name: name == "loss",
        lambda name: "loss" in name and "total" in name,
        lambda name: "loss" in name,
    ):
        found = [number for name, (_, number) in zip(names, among, strict=True) if fits(name)]
        if found:
            return found[0] if len(found) == 1 else None
    if not reached and any(tensor.requires_grad for tensor in tensors_in(output)):
        return None  # what there is may be a metric
    found = [number for name, number in among if reached or not name]
    return found[0] if len(found) == 1 else None


def _numbers_in(output: Any, name: str = "", depth: int = 2) -> Iterator[tuple[str, Tensor]]:
    """Yield every single floating-point number of an output with its name there.

    ``""`` where it has none.
    """
    if isinstance(output, Tensor):
        if output.dim() == 0 and output.is_floating_point():
            yield name, output
    elif depth and isinstance(output, Mapping):
        for key, value in output.items():
            yield from _numbers_in(value, str(key), depth - 1)
    elif depth and isinstance(output, tuple | list):
        names = getattr(output, "_fields", ("",) * len(output))
        for key, value in zip(names, output, strict=True):
            yield from _numbers_in(value, key or name, depth - 1)
    elif depth and hasattr(output, "__dict__"):
        for key, value in vars(output).items():
            yield from _numbers_in(value, key, depth - 1)
        if "loss" not in vars(output):  # a property
            yield from _numbers_in(getattr(output, "loss", None), "loss", depth - 1)
