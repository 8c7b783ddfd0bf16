"""Number formats of an analysis, for computing and for summing."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for a float64 tensor, else float32.

    Example:
        >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the format of long sums on a tensor's device: float64, or float32 on MPS.

    Example:
        >>> sum_dtype(torch.zeros(1))
        torch.float64
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64
