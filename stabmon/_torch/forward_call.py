"""Forwards of a step, recorded so that they can be replayed without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.isolation import side_effect_free
from stabmon._torch.ranks.identity import is_fully_sharded
from stabmon._torch.tensors import is_sharded, tensors_in, without_graph

_KEEP_BYTES = 1 << 26
"""Bytes of inputs of one step that are kept; its first forward's in any case."""


@dataclass(frozen=True)
class RandomState:
    """State of torch's random generators on the CPU and on the CUDA devices of a module."""

    cpu: Tensor
    cuda: Mapping[int, Tensor]
    """Index of a device -> the state of its generator."""

    @classmethod
    def now(cls, module: nn.Module) -> RandomState:
        """Return the present state; costs microseconds and no device synchronisation."""
        if not torch.cuda.is_initialized() or is_capturing():
            return cls(torch.get_rng_state(), {})
        devices = {torch.cuda.current_device()}
        if torch.cuda.device_count() > 1:
            places = {each.device for each in module.parameters()}
            devices |= {
                each.index for each in places if each.type == "cuda" and each.index is not None
            }
        states = {each: torch.cuda.get_rng_state(each) for each in sorted(devices)}
        return cls(torch.get_rng_state(), states)

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)


@dataclass(frozen=True)
class ForwardCall:
    """Outermost call into the model, with all that a replay needs.

    Keeps its inputs alive, but no graph behind them.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random_state: RandomState
    autocast: Mapping[str, tuple[bool, torch.dtype]]
    """Device type -> whether autocast was on, and its dtype."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardCall:
        """Return the call that is about to be made.

        Args:
            module: the module to be called.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        return cls(
            module,
            without_graph(args),
            without_graph(kwargs),
            RandomState.now(module),
            _autocast_now(),
        )

    def inputs(self) -> Iterator[tuple[str, Tensor]]:
        """Return every tensor given to the model, by its argument's name or position."""
        named = {f"argument {i}": value for i, value in enumerate(self.args)} | dict(self.kwargs)
        return ((name, tensor) for name, value in named.items() for tensor in tensors_in(value))

    @contextmanager
    def again(self, model: nn.Module) -> Iterator[Callable[[], Any]]:
        """Yield a function that makes the call once more.

        Uncompiled, without gradients unless they are turned on, and without other ranks. When it is
        left, ``model`` and the random generators are as they were.

        Args:
            model: the whole model, whose state is restored.
        """
        module = self.module
        while isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module  # the wrapper's forward would wait for other ranks
        with side_effect_free(model), ExitStack() as stack:
            for device_type, (enabled, dtype) in self.autocast.items():
                stack.enter_context(
                    torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            self.random_state.restore()
            yield lambda: module(*self.args, **self.kwargs)


class StepForwards:
    """Forwards of a step so far.

    Those whose inputs fit into a bounded memory are kept to be replayed.
    """

    def __init__(self) -> None:
        self.calls: list[ForwardCall] = []
        self.count = 0
        """Number of calls of the module that was called first: one for each micro-batch."""
        self.shares = False
        """True if each forward's loss is its share of the step's loss.

        Transformers marks that by ``num_items_in_batch``.
        """
        self._bytes = 0
        self._first: nn.Module | None = None

    def add(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool
    ) -> ForwardCall | None:
        """Count a forward that begins.

        Args:
            module: the module that is called.
            args: its positional arguments.
            kwargs: its keyword arguments.
            keep: whether to keep it if there is room.

        Returns:
            The call, if it was kept.
        """
        self._first = module if self._first is None else self._first
        self.count += module is self._first
        self.shares = self.shares or kwargs.get("num_items_in_batch") is not None
        if not keep:
            return None
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((args, kwargs)))
        if self.calls and self._bytes + size > _KEEP_BYTES:
            return None
        self._bytes += size
        self.calls.append(ForwardCall.of(module, args, kwargs))
        return self.calls[-1]


def is_split(model: nn.Module) -> bool:
    """Return True if parameters lie on several ranks (FSDP, tensor parallel, ZeRO 3).

    One rank cannot run the model by itself then.
    """
    if any(is_sharded(each) or hasattr(each, "ds_id") for each in model.parameters()):
        return True
    return is_fully_sharded(model)


def _autocast_now() -> dict[str, tuple[bool, torch.dtype]]:
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.amp.is_autocast_available(accelerator.type):
        devices.append(accelerator.type)
    return {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in devices
    }
