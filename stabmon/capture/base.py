"""What an adapter is, and what all adapters share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture


class Adapter(Protocol):
    """One way of seeing attention calls."""

    name: str
    looks_for: str
    """What it recognises, in a few words."""

    def installed(self, capture: AttentionCapture) -> AbstractContextManager[object]:
        """Installs itself on entering and leaves everything as it was on leaving."""
        ...


@contextmanager
def isolated() -> Iterator[None]:
    """Nothing run in here is differentiated, autocast, or seen by any mode (selective checkpointing caches by one)."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
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
