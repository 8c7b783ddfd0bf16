"""What all adapters share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from stabmon.capture.names import ModuleNames
    from stabmon.capture.session import AttentionCapture

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads")
"""What models call a module's number of heads."""


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
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


@contextmanager
def isolated() -> Iterator[None]:
    """Nothing run in here is differentiated, autocast, or seen by any mode (selective checkpointing caches by one)."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(function_modes_off())
        stack.enter_context(_disable_current_modes())
        for device_type in ("cpu", "cuda", "mps", "xpu", "hpu"):
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def kernel_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``tensor`` is computed right here: autocast's, where it is on."""
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def nearest_module(names: ModuleNames) -> nn.Module | None:
    """The module whose method called this; None where the nearest module is none of the model's (a teacher, a criterion).

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


def head_count(module: nn.Module, folded: int) -> int:
    """Heads of a tensor whose leading dimension of size ``folded`` may hold batch and heads at once; 1 where unknown."""
    for name in HEADS:
        heads = getattr(module, name, None)
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 and folded % heads == 0:
            return heads
    return 1


def with_heads(tensor: Tensor, heads: int = 1) -> Tensor:
    """Any ``[..., L, D]`` as ``[B, H, L, D]``: a leading dimension holds batch times ``heads``; more than two are batch."""
    if tensor.ndim == 3:
        return tensor.reshape(-1, heads, *tensor.shape[1:])
    while tensor.ndim < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


Handler = Callable[["AttentionCapture", Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Runs one torch function for the model, and records what it learns: ``(capture, function, args, kwargs) -> result``."""
