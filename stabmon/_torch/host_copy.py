"""A small tensor on its way to the host, which training does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Begin to copy a tensor to the host, to be read later.

    On CUDA the copy goes to pinned memory behind the work that is queued now. To read it waits for
    that work alone: read one step later, the device has the next step's work to go on with.

    Args:
        tensor: the tensor; without gradients from here on.

    Example:
        >>> HostCopy(torch.tensor(2.0)).read()
        tensor(2.)
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach()
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor.detach(), non_blocking=True)
            with torch.cuda.device(tensor.device):
                self._done = torch.cuda.Event()
                self._done.record()

    def read(self) -> Tensor:
        """Return the copy, once it has arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy
