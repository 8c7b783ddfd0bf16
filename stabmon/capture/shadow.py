"""A forward that leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """Forwards of ``model`` in here run uncompiled and without gradients, and are undone.

    Undone are: draws from the random generators of Python, NumPy and torch (every device of the model), changes of buffers
    (bit for bit), and attributes that modules set on themselves. Not undone are changes inside lists and dicts that a module
    holds, and what hooks of others do.
    """
    eager = torch.compiler.set_stance("force_eager")
    with random_state_kept(model), modules_kept(model), autocast_cache_off(), torch.no_grad(), eager:
        yield


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """The global random generators are afterwards where they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    kinds = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} - {"cpu", "meta"}
    devices = {kind: torch.get_device_module(kind) for kind in sorted(kinds)}
    states = {kind: module.get_rng_state_all() for kind, module in devices.items()}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for kind, module in devices.items():
            module.set_rng_state_all(states[kind])


@contextmanager
def modules_kept(model: nn.Module) -> Iterator[None]:
    """Buffers have afterwards the bits they had, and modules the attributes they had."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        kept += [(namespace, dict(namespace)) for namespace in (module.__dict__, module._buffers)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for namespace, before in kept:
            if len(namespace) != len(before) or any(namespace.get(name, kept) is not before[name] for name in before):
                namespace.clear()
                namespace.update(before)
        for buffer, bits in buffers:
            restore(buffer, bits)


def restore(buffer: Tensor, bits: Tensor) -> None:
    """Write ``bits`` back into ``buffer`` if it holds others, in a way that autograd takes no notice of.

    Its version does not tell: batch norm writes its running statistics past the version counter.
    """
    if not torch.equal(buffer, bits):
        buffer.data.copy_(bits)


@contextmanager
def autocast_cache_off() -> Iterator[None]:
    """Weights cast in here without gradients are not kept for the forward that needs them."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
