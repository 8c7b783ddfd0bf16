"""Gradients before an optimizer step: when they are ready, their norms, and a cheap look at whether
they are finite.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.tensors import is_sharded
from stabmon.capture.names import clean_name


class GradientNorms:
    """L2 norms of a step's gradients as each backward left them, before anything clips them.

    A parameter's norm is taken at the end of the last backward that added to its gradient, and
    stays on its device until it is asked for. So a step may have several backwards, with clips and
    optimizer steps in between.
    """

    def __init__(self) -> None:
        self._stacks: list[Tensor] = []
        self._at: dict[int, int] = {}
        """``id`` of a parameter -> where its newest norm lies in the stacks laid end to end."""
        self._scales: list[float | None] = []
        self._unknown = False

    def measure(self, model: nn.Module, added: Mapping[int, Tensor], scale: float | None) -> None:
        """Take the norms of all gradients that were ``added`` to, and of those that no backward of
        this step has shown yet.

        Args:
            model: whose parameters count.
            added: the parameters that this backward added to, by ``id``.
            scale: what a gradient scaler has multiplied them by; None without one.
        """
        graded = [each for each in model.parameters() if each.grad is not None]
        fresh = [each for each in graded if id(each) in added or id(each) not in self._at]
        gradients = [each.grad for each in fresh if each.grad is not None]
        taken = any(
            each.grad is None for each in added.values()
        )  # an optimizer that steps inside backward, ZeRO
        self._unknown = (
            self._unknown or taken or any(is_sharded(grad) or grad.is_sparse for grad in gradients)
        )
        if self._unknown or not gradients:
            return
        narrow = any(grad.element_size() < 4 for grad in gradients)
        with torch.no_grad():
            norms = torch._foreach_norm(gradients, 2, torch.float32 if narrow else None)
            device = norms[0].device
            self._stacks.append(torch.stack([norm.to(device) for norm in norms]))
        self._at |= {id(each): len(self._scales) + i for i, each in enumerate(fresh)}
        self._scales += [scale] * len(fresh)

    def by_layer(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
        """The norm of each attention module's own gradients, and of all under ``""``; one transfer
        to the host.

        Empty where they cannot be known: no backward was seen, it left no gradients, or they are
            sparse or sharded. Empty also
        where a gradient scaler will skip the step.
        """
        if self._unknown or not self._stacks:
            return {}
        device = self._stacks[0].device
        norms = torch.cat([stack.to(device) for stack in self._stacks]).tolist()
        if any(
            scale is not None and not math.isfinite(norms[at])
            for at, scale in enumerate(self._scales)
        ):
            return {}
        squares = {
            key: (norms[at] / (self._scales[at] or 1.0)) ** 2 for key, at in self._at.items()
        }
        found = {"": math.sqrt(sum(squares.get(id(each), 0.0) for each in model.parameters()))}
        for layer, module in layers.items():
            own = [
                squares[id(parameter)]
                for parameter in module.parameters()
                if id(parameter) in squares
            ]
            if own:
                found[clean_name(layer)] = math.sqrt(sum(own))
        return found


class AfterBackward:
    """Calls ``tell(added)`` at the end of each backward that adds to a gradient of the model,
    before anything can clip it.

    The parameters themselves are watched, not what the model returns: so it does not matter which
    output, hidden state or hook the loss comes from. Under DDP gradients are summed over ranks by
    then. A backward that runs inside another (a checkpointed segment, a forward made anew in a
    hook) is told with the outer one where that has added to a gradient before, else by itself. What
    ``tell`` raises is its to handle; it must not raise.
    """

    def __init__(self, tell: Callable[[dict[int, Tensor]], None]) -> None:
        self._tell = tell
        self._added: dict[int, Tensor] = {}
        self._waiting = False
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Watch the parameters that are trained now, until :meth:`let_go`."""
        self.let_go()
        this = weakref.ref(
            self
        )  # parameters keep hooks where the garbage collector does not look: a strong one is never freed

        def on_gradient(parameter: Tensor) -> None:
            watching = this()
            if watching is not None:
                watching._on_gradient(parameter)

        self._handles = [
            parameter.register_post_accumulate_grad_hook(on_gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def let_go(self) -> None:
        """Take every hook out again; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def reset(self) -> None:
        """Forget a backward that never came to its end. Only to be called where none is running."""
        self._added, self._waiting = {}, False

    def _on_gradient(self, parameter: Tensor) -> None:
        if is_capturing():
            return
        self._added[id(parameter)] = parameter
        if not self._waiting:
            self._waiting = True
            _queue(
                lambda: _queue(self._ended)
            )  # twice, to come after what DDP queues in the meantime

    def _ended(self) -> None:
        added = self._added
        self.reset()
        if self._handles:
            self._tell(added)


def _queue(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
