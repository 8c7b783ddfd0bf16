"""A forward that leaves no trace."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Forwards of ``model`` in here run uncompiled and without gradients, and are undone.

    Undone are: draws from the random generators of Python, NumPy and torch (every device of the
        model) and from those that modules hold,
    changes of buffers (bit for bit), attributes that modules set on themselves, and what is added
    to or taken from lists, dicts, sets and queues that they hold. Not undone are changes deeper
    inside, and what hooks of others do (see :func:`has_hooks_of_others`).
    """
    eager = torch.compiler.set_stance("force_eager")
    with (
        random_state_kept(model),
        modules_kept(model),
        autocast_cache_off(),
        torch.no_grad(),
        eager,
    ):
        yield


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """The global random generators are afterwards where they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    kinds = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} - {
        "cpu",
        "meta",
    }
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
    put_back: list[Callable[[], None]] = []
    for module in model.modules():
        kept += [(namespace, dict(namespace)) for namespace in (module.__dict__, module._buffers)]
        put_back += [
            undo
            for name, held in module.__dict__.items()
            if name not in _OF_TORCH and (undo := _keeper(held))
        ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for namespace, before in kept:
            if len(namespace) != len(before) or any(
                namespace.get(name, kept) is not before[name] for name in before
            ):
                namespace.clear()
                namespace.update(before)
        for undo in put_back:
            undo()
        for buffer, bits in buffers:
            restore(buffer, bits)


def _keeper(held: Any) -> Callable[[], None] | None:
    """What puts back a container or a random generator that a module holds; None for anything
    else.
    """
    if type(held) in (list, deque) or isinstance(held, list):
        entries = list(held)

        def put_back() -> None:
            if len(held) != len(entries) or any(
                now is not was for now, was in zip(held, entries, strict=True)
            ):
                held.clear()
                held.extend(entries)

        return put_back
    if type(held) in (dict, OrderedDict, defaultdict, Counter, set):
        content = held.copy()

        def refill() -> None:
            if (
                held != content
                if isinstance(held, set)
                else list(map(id, held.values())) != list(map(id, content.values()))
            ):
                held.clear()
                held.update(content)

        return refill
    if isinstance(held, torch.Generator):
        drawn, generator = held.get_state(), held

        def draw_again() -> None:
            generator.set_state(drawn)

        return draw_again
    if isinstance(held, np.random.Generator):
        numbers = copy.deepcopy(held.bit_generator.state)
        return lambda: setattr(held.bit_generator, "state", numbers)
    if isinstance(held, np.random.RandomState | random.Random):
        get, put = (
            ("get_state", "set_state")
            if isinstance(held, np.random.RandomState)
            else ("getstate", "setstate")
        )
        state = getattr(held, get)()
        return lambda: getattr(held, put)(state)
    return None


_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module holds: its parameters, buffers, children and hooks."""
_KNOWN = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "stabmon",
)
"""Packages whose forward hooks may run once more without a person's noticing."""


def has_hooks_of_others(model: nn.Module) -> bool:
    """Whether a forward that nobody asked for would be noticed: by a hook that is not of torch, its
    frameworks or ours.
    """
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            inner = getattr(hook, "func", hook)
            origin = getattr(inner, "__module__", None) or type(inner).__module__
            if origin.partition(".")[0] not in _KNOWN:
                return True
    # hooks on every module of the process are kept in its globals (torch 2.13); gone, there are
    # none to be seen
    hooks = nn.modules.module
    return bool(
        getattr(hooks, "_global_forward_hooks", {})
        or getattr(hooks, "_global_forward_pre_hooks", {})
    )


def restore(buffer: Tensor, bits: Tensor) -> None:
    """Write ``bits`` back into ``buffer`` if it holds others, in a way that autograd takes no
    notice of.

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
