"""Forwards without side effects."""

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
    """Run forwards of a model uncompiled, without gradients and without side effects.

    Undone are: draws from the random generators of Python, NumPy and torch (every device of the
    model) and from those that modules hold, changes of buffers (bit for bit), attributes that
    modules set on themselves, and what is added to or taken from lists, dicts, sets and queues that
    they hold. Not undone are changes deeper inside, and side effects of hooks of others (see
    :func:`has_hooks_of_others`).
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
def random_state_kept(model: nn.Module | None = None) -> Iterator[None]:
    """Restore the global random generators afterwards.

    Args:
        model: generators of its devices are restored too; None for those of the CPU alone.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002
    tensors = [] if model is None else [*model.parameters(), *model.buffers()]
    kinds = {tensor.device.type for tensor in tensors}
    devices = {kind: torch.get_device_module(kind) for kind in sorted(kinds - {"cpu", "meta"})}
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
    """Restore the bits of buffers and the attributes of modules afterwards."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    put_back: list[Callable[[], None]] = []
    for module in model.modules():
        # a module's own dict of buffers: a forward may replace entries, which named_buffers would
        # not show (checked with torch 2.13); gone, this raises AttributeError
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
    """Return a function that restores a container or a random generator of a module.

    None for anything else.
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
            if _content(held) != _content(content):
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
        between = "_" if isinstance(held, np.random.RandomState) else ""
        state = getattr(held, f"get{between}state")()
        return lambda: getattr(held, f"set{between}state")(state)
    return None


def _content(held: Any) -> Any:
    """Return the identities of a mapping's values in order; a set itself."""
    return held if isinstance(held, set) else list(map(id, held.values()))


_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, buffers, children and hooks."""
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
    """Return True if a person's own forward hooks would notice an extra forward.

    Hooks of torch, its frameworks and stabmon do not count.
    """
    # a module's own hooks, which have no public list (checked with torch 2.13); renamed, this
    # raises AttributeError
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            inner = getattr(hook, "func", hook)
            origin = getattr(inner, "__module__", None) or type(inner).__module__
            if origin.partition(".")[0] not in _KNOWN:
                return True
    # hooks on every module of the process are kept in these globals (checked with torch 2.13);
    # gone, none are found
    hooks = nn.modules.module
    return bool(
        getattr(hooks, "_global_forward_hooks", {})
        or getattr(hooks, "_global_forward_pre_hooks", {})
    )


def restore(buffer: Tensor, bits: Tensor) -> None:
    """Write bits back into a buffer if it holds others, unnoticed by autograd.

    Its version does not show changes: batch norm writes its running statistics past the version
    counter.

    Args:
        buffer: the buffer.
        bits: a copy of what it held.
    """
    if not torch.equal(buffer, bits):
        buffer.data.copy_(bits)


@contextmanager
def autocast_cache_off() -> Iterator[None]:
    """Keep weights that are cast without gradients out of autocast's cache.

    The forward that needs gradients would use them.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
