"""Cases of model families: a small model, and the float64 attention of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from references.formulas import Attention
from torch import Tensor, nn

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Call:
    """One run of an attention module in a forward."""

    name: str
    """Qualified module name; ``name#1``… from the module's second run on."""
    module: Any
    model: Any
    """Model of the module."""
    inputs: Mapping[str, Any]
    """Arguments of the module's forward, by parameter name."""
    outputs: list[Any] = field(default_factory=list)
    """Output of the module, once it has run."""


@dataclass(frozen=True)
class Case:
    """A model with random (or trained) weights, and the reference for its attention."""

    name: str
    build: Callable[[str], tuple[nn.Module, Batch]]
    """Function from an implementation's name to a model and one batch.

    In the default dtype.
    """
    attention: type[nn.Module] | str
    """Class, or class name, of the attention modules."""
    attend: Callable[[Call, Batch], Attention]
    """Float64 reference of one call, from its inputs and the module's own weights."""
    expected: int
    """Attention calls in one forward, known from the architecture."""
    implementations: tuple[str, ...] = ("sdpa", "eager")
    training: bool = False
    """Run the model in training mode, with its dropout."""
    trained: bool = False
    """True for weights from a file, in float32."""


@contextmanager
def record_calls(
    model: nn.Module, attention: type[nn.Module] | str, **forced: Any
) -> Iterator[list[Call]]:
    """Collect every run of the modules of class ``attention``.

    ``forced`` arguments replace the model's own.
    """
    calls: list[Call] = []
    handles = []
    runs: dict[str, int] = {}

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            index = runs[name] = runs.get(name, -1) + 1
            calls.append(
                Call(f"{name}#{index}" if index else name, module, model, dict(bound.arguments))
            )
            return args, kwargs | forced

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1].outputs.append(output)

    for name, module in model.named_modules():
        if type(module).__name__ == attention or (
            isinstance(attention, type) and isinstance(module, attention)
        ):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def using(implementation: str) -> dict[str, Any]:
    """Return the configuration argument that chooses an attention implementation.

    transformers' types do not know it.
    """
    return {"attn_implementation": implementation}


def liven(model: nn.Module, seed: int = 0) -> None:
    """Add noise to every vector of parameters.

    Biases and norm gains start at constants, where a slip would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype),
                    alpha=0.1,
                )


def spread_heads(weight: Tensor, heads: int, low: float, high: float) -> None:
    """Scale the query heads of a weight ``[H * D, C]`` from ``low`` to ``high``.

    From diffuse to one-hot; also a view of a weight.
    """
    factors = torch.logspace(0, 1, heads, base=high / low, dtype=weight.dtype) * low
    with torch.no_grad():
        weight.mul_(factors.repeat_interleave(weight.shape[0] // heads)[:, None])


def padded(batch: int, length: int, valid: tuple[int, ...], *, left: bool = False) -> Tensor:
    """Return int64 ``[B, S]``: 1 at the ``valid[b]`` real tokens of each row.

    Padding on the right, or on the left.
    """
    positions = torch.arange(length).expand(batch, length)
    real = torch.tensor(valid)[:, None]
    return ((positions >= length - real) if left else (positions < real)).long()


def tokens(batch: int, length: int, vocabulary: int, seed: int = 1) -> Tensor:
    """Return int64 ``[B, S]``: random token numbers from 3 on.

    The first ones tend to be special.
    """
    return torch.randint(
        3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
