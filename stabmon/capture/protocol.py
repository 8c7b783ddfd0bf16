"""What all adapters share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from stabmon.model_names import HEAD_COUNTS

if TYPE_CHECKING:
    from stabmon.capture.names import ModuleNames
    from stabmon.capture.session import AttentionCapture


def bind(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name; ``names`` are those of the leading parameters, in order."""
    return dict(zip(names, args, strict=False), **kwargs)


@contextmanager
def function_modes_off() -> Iterator[None]:
    """No TorchFunctionMode is on, ours or another's; those entered in here work as usual."""
    modes = []
    while _get_current_function_mode() is not None:
        modes.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@functools.cache
def autocast_devices() -> tuple[str, ...]:
    """The kinds of device that this build of torch can autocast on."""
    return tuple(
        kind
        for kind in ("cpu", "cuda", "mps", "xpu", "hpu")
        if torch.amp.is_autocast_available(kind)
    )


@contextmanager
def isolated() -> Iterator[None]:
    """Nothing run in here is differentiated, autocast, or seen by any mode (selective checkpointing
    caches by one).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(function_modes_off())
        stack.enter_context(_disable_current_modes())
        for device_type in autocast_devices():
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def kernel_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``tensor`` is computed right here: autocast's, where
    it is on.
    """
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def nearest_module(names: ModuleNames) -> nn.Module | None:
    """The module whose method called this; None where the nearest module is none of the model's (a
    teacher, a criterion).

    A bare ``nn.Softmax`` stands for the module that holds it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and not isinstance(owner, nn.Softmax):
            return owner if owner in names else None
        frame = frame.f_back
    return None


def head_count(module: nn.Module) -> int | None:
    """How many heads a module says that it has."""
    for name in HEAD_COUNTS:
        heads = getattr(module, name, None)
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
            return heads
    return None


Layout = Callable[[Tensor], Tensor]
"""Lays out ``[..., L, D]`` as ``[B, H, L, D]``."""


def layout(
    shape: torch.Size, module: nn.Module, *, grouped: bool = False, operand: Tensor | None = None
) -> Layout:
    """How tensors of ``shape`` and of its like are laid out by batch and head.

    One leading dimension is batch times the heads that ``module`` has, or batch alone. Of three or
    more, the first is batch and the others are heads where they make up the module's number of
    heads or ``grouped`` says so; else one of them is heads, and the others (windows, blocks) are
    batch: see :func:`head_dimension`.

    Args:
        shape: ``[..., L, D]``.
        module: which attends.
        grouped: whether all but the first leading dimension are heads.
        operand: a query or key with these leading dimensions, if there is one.
    """
    heads = head_count(module)
    if len(shape) == 3:
        folded = heads if heads is not None and shape[0] % heads == 0 else 1
        return lambda tensor: tensor.reshape(-1, folded, *tensor.shape[1:])
    if len(shape) > 4:
        if grouped or (heads == shape[1:-2].numel() and heads not in shape[1:-2]):
            return lambda tensor: tensor.flatten(1, -3)
        place = head_dimension(shape, heads, operand)
        return lambda tensor: with_heads(tensor.movedim(place, -3))
    return with_heads


def head_dimension(shape: torch.Size, heads: int | None, operand: Tensor | None) -> int:
    """Which of several leading dimensions is the heads.

    It is the one of the size that the module says. Among equals, and where it says nothing, it is
    the one that lies beside the head dimension in the memory of ``operand``, as a projection has
    put it there; else the last.
    """
    fitting = [d for d in range(len(shape) - 2) if shape[d] == heads] or list(range(len(shape) - 2))
    if operand is not None and operand.ndim == len(shape) and operand.stride(-1) == 1:
        beside = [d for d in fitting if shape[d] > 1 and operand.stride(d) == operand.shape[-1]]
        if len(beside) == 1:
            return beside[0]
    return fitting[-1]


def with_heads(tensor: Tensor) -> Tensor:
    """``[..., H, L, D]`` as ``[B, H, L, D]``: what comes before the heads is batch, and what is
    missing has size 1.
    """
    while tensor.ndim < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


Handler = Callable[
    ["AttentionCapture", Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any
]
"""Runs one torch function for the model, and records what it learns: ``(capture, function, args,
kwargs) -> result``.
"""
