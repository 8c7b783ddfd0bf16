"""The state of torch in which operators compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from stabmon._torch.precision import full_float32


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Compute in here without gradients, without autocast and with float32 products in full.

    Args:
        device: the device of the tensors.
    """
    has_autocast = torch.amp.is_autocast_available(device.type)
    uncast = torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()
    with torch.no_grad(), uncast, full_float32(device):
        yield
