"""Products of float32 matrices in full precision, whatever the user has chosen for the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FULL = ("none", "ieee")
"""Settings under which torch multiplies float32 in float32."""


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices of a device in float32 in here, neither in TF32 nor in bfloat16.

    The user's setting is read, and is only touched where it asks for less.

    Args:
        device: the device of the matrices.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_float32(torch.device("cpu")):
        ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    products = getattr(backend, "matmul", None)
    if not hasattr(products, "fp32_precision"):  # before torch 2.9
        chosen = torch.get_float32_matmul_precision()
        if chosen == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    assert products is not None
    set_to = products.fp32_precision
    if set_to in _FULL:
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = "none"  # as where the setting was inherited
        if products.fp32_precision != set_to:
            products.fp32_precision = set_to
