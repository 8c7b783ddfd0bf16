"""Function modes, dispatch modes and autocast of torch, switched off or asked for.

Torch keeps function modes in a stack and offers no public way to take one out of the middle of it,
or to run something below all of them. The functions imported with an underscore do that in torch
2.13; without them nothing of capture works, and importing this fails at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

# Private, checked with torch 2.13: the stack of function modes of this thread, its top, and a pop
# and push that do not run the modes' own __enter__ and __exit__. If they go, `push`, `remove` and
# `function_modes_off` need another way to the stack.
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

# Private, checked with torch 2.13: takes all dispatch modes off and puts them back on leaving. If
# it goes, selective activation checkpoints would cache what capture computes and replay it wrongly.
from torch.utils._python_dispatch import _disable_current_modes


def push(mode: TorchFunctionMode) -> None:
    """Put ``mode`` on top of torch's stack."""
    _push_mode(mode)


def remove(mode: TorchFunctionMode | None) -> bool:
    """Take ``mode`` off torch's stack; return whether it was there.

    Modes that others have put on top of it stay.
    """
    if mode is None or not any(mode is other for other in _get_current_function_mode_stack()):
        return False
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    return True


@contextmanager
def taken_off(mode: TorchFunctionMode | None) -> Iterator[None]:
    """Switch ``mode`` off in here, where it lies on top of torch's stack."""
    if mode is None or _get_current_function_mode() is not mode:
        yield
        return
    _pop_mode()
    try:
        yield
    finally:
        _push_mode(mode)


@contextmanager
def function_modes_off() -> Iterator[None]:
    """Switch every function mode off in here; those entered in here work as usual."""
    modes = []
    while _get_current_function_mode() is not None:
        modes.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextmanager
def modes_off() -> Iterator[None]:
    """Hide everything done in here from torch's modes and from tensor subclasses."""
    with ExitStack() as stack:
        # Private, checked with torch 2.13: also what torch runs itself in default
        # `__torch_function__`. It stops our own mode from seeing the probes of provenance.
        stack.enter_context(torch._C.DisableTorchFunction())
        # Private, checked with torch 2.13: number of dispatch modes. Asked first since switching
        # none of them off costs more than the probe itself.
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        yield


@functools.cache
def autocast_devices() -> tuple[str, ...]:
    """Return the device types on which this build of torch can autocast."""
    return tuple(
        kind
        for kind in ("cpu", "cuda", "mps", "xpu", "hpu")
        if torch.amp.is_autocast_available(kind)
    )


@contextmanager
def isolated() -> Iterator[None]:
    """Run what is in here without gradients, autocast and modes of torch.

    Dispatch modes are off as well: selective activation checkpoints cache by one.
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
    """Return the dtype in which a matrix product of ``tensor`` is computed here.

    It is autocast's where that is on; float64 is left alone by autocast.
    """
    device_type = tensor.device.type
    autocasts = torch.amp.is_autocast_available(device_type)
    if not autocasts or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    if tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)
