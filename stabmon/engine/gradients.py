"""Notice when the gradients of a backward are complete, and measure their norms."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.ranks.identity import has_flat_shards
from stabmon._torch.ranks.shards import share_of
from stabmon._torch.tensors import is_sharded, local
from stabmon.capture.names import clean_name

logger = logging.getLogger("stabmon")


class GradientNorms:
    """L2 norms of a step's gradients as each backward left them, not clipped.

    A parameter's norm is taken at the end of the last backward that added to its gradient, and
    stays on its device until :meth:`by_layer`. So a step may have several backwards, with clips
    and optimizer steps in between.
    """

    def __init__(self) -> None:
        self._stacks: list[Tensor] = []
        self._at: dict[int, int] = {}
        """Index of a parameter's newest norm in the concatenated stacks, by ``id``."""
        self._scales: list[float | None] = []
        self._shares: list[float] = []
        self.why_unknown = ""
        """Reason for which norms cannot be known, in words; empty where they can."""
        self.is_partial = False
        """Norms are of this rank's parts: see :meth:`squares`."""

    def measure(
        self,
        model: nn.Module,
        added: Mapping[int, Tensor],
        scale: float | None,
        divisor: float = 1.0,
    ) -> None:
        """Measure the gradients that a backward added to, and those not measured yet.

        Args:
            model: the model whose parameters count.
            added: the parameters that this backward added to, by ``id``.
            scale: the factor of a gradient scaler in the gradients; None without one.
            divisor: number by which a pipeline's schedule will divide the gradients.
        """
        graded = [each for each in model.parameters() if each.grad is not None]
        fresh = [each for each in graded if id(each) in added or id(each) not in self._at]
        gradients = [each.grad for each in fresh if each.grad is not None]
        # an optimizer that steps inside backward, or ZeRO, has taken gradients away
        taken = any(each.grad is None for each in added.values())
        if any(grad.is_sparse for grad in gradients):
            self.why_unknown = "some are sparse"
        elif taken:
            self.why_unknown = "something takes gradients away inside backward"
        if has_flat_shards(model):
            self.why_unknown = "FSDP1 shards them in flat parts; use fully_shard (FSDP2)"
        shares = [1.0] * len(gradients)
        if any(is_sharded(each) for each in model.parameters()):
            self.is_partial = True
            try:
                shares = [share_of(grad) for grad in gradients]
            except ValueError as error:
                self.why_unknown = f"of sharded gradients {error}"
            gradients = [local(grad) for grad in gradients]
        if self.why_unknown or not gradients:
            return
        narrow = any(grad.element_size() < 4 for grad in gradients)
        with torch.no_grad():
            # torch._foreach_norm is the kernel behind clip_grad_norm_: one launch for all tensors
            # (checked with torch 2.13); without it, one vector_norm a tensor gives the same
            norms = torch._foreach_norm(gradients, 2, torch.float32 if narrow else None)
            device = norms[0].device
            self._stacks.append(torch.stack([norm.to(device) for norm in norms]))
        self._at |= {id(each): len(self._scales) + i for i, each in enumerate(fresh)}
        self._scales += [scale] * len(fresh)
        self._shares += [share / divisor**2 for share in shares]

    def by_layer(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the gradient norm of each attention module, and of all as ``""``.

        Costs one transfer to the host.

        Args:
            model: the model whose parameters count.
            layers: the attention modules by name.

        Returns:
            Norms by name, without a scaler's factor. Empty where they cannot be known: no backward
            was seen, it left no gradients, or they are sparse. Empty also where a gradient scaler
            will skip the step, and of sharded gradients, whose :meth:`squares` ranks must add.
        """
        squares = {} if self.is_partial else self.squares(model, layers)
        return {name: math.sqrt(square) for name, square in squares.items()}

    def squares(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the squares of the norms of :meth:`by_layer`.

        Of sharded gradients those of this rank's parts: their sum over ranks is the whole.
        """
        if self.why_unknown or not self._stacks:
            return {}
        device = self._stacks[0].device
        norms = torch.cat([stack.to(device) for stack in self._stacks]).tolist()
        if any(
            scale is not None and not math.isfinite(norms[at])
            for at, scale in enumerate(self._scales)
        ):
            return {}
        squares = {
            key: self._shares[at] * (norms[at] / (self._scales[at] or 1.0)) ** 2
            for key, at in self._at.items()
        }
        found = {"": sum(squares.get(id(each), 0.0) for each in model.parameters())}
        for layer, module in layers.items():
            own = [
                squares[id(parameter)]
                for parameter in module.parameters()
                if id(parameter) in squares
            ]
            if own:
                found[clean_name(layer)] = sum(own)
        return found


class AfterBackward:
    """Hooks that report the end of each backward that adds to a gradient of the model.

    They report before anything can clip the gradients. The parameters themselves have the hooks,
    not the model's outputs: so it does not matter which output, hidden state or hook the loss comes
    from. Under DDP gradients are summed over ranks by then. A backward that runs inside another
    (a checkpointed segment, a forward made again in a hook) is reported with the outer one where
    that has added to a gradient before, else by itself. Gradients that come outside of a backward, as
    those of FSDP2 within a pipeline's schedule, are reported once all parameters have theirs.

    Args:
        on_end: called with the parameters that were added to, by ``id``; it must not raise.
    """

    def __init__(self, on_end: Callable[[dict[int, Tensor]], None]) -> None:
        self._on_end = on_end
        self._added: dict[int, Tensor] = {}
        self._unseen: set[int] = set()
        """Parameters that were not added to since :meth:`watch`, by ``id``."""
        self._waiting = False
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Add hooks to the parameters that are trained now, until :meth:`close`."""
        self.close()
        # parameters keep hooks where the garbage collector does not look: a strong reference from
        # one would never be freed
        this = weakref.ref(self)

        def on_gradient(parameter: Tensor) -> None:
            watching = this()
            try:
                if watching is not None:
                    watching._add(parameter)
            except Exception as error:  # a hook in backward, which goes on
                logger.error("the end of a backward is not seen: %s", error)

        trained = [each for each in model.parameters() if each.requires_grad]
        self._unseen = {id(each) for each in trained}
        self._handles = [each.register_post_accumulate_grad_hook(on_gradient) for each in trained]

    def close(self) -> None:
        """Remove every hook; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def reset(self) -> None:
        """Drop a backward that never came to its end; only while none is running."""
        self._added, self._waiting = {}, False

    def _add(self, parameter: Tensor) -> None:
        if is_capturing():
            return
        self._added[id(parameter)] = parameter
        self._unseen.discard(id(parameter))
        # torch._C._current_graph_task_id() is -1 outside of a backward (checked with torch 2.13);
        # without it no callback could be told from one that torch refuses
        if torch._C._current_graph_task_id() == -1:
            if not self._unseen:
                self._ended()
        elif not self._waiting:
            self._waiting = True
            _queue(self._wait_for_others)

    def _wait_for_others(self) -> None:
        """Queue the end again, to come after what DDP has queued in the meantime."""
        try:
            _queue(self._ended)
        except Exception as error:  # as above
            logger.error("the end of a backward is not seen: %s", error)

    def _ended(self) -> None:
        try:
            added = self._added
            self.reset()
            if self._handles:
                self._on_end(added)
        except Exception as error:  # as above
            logger.error("the gradients of a backward are not measured: %s", error)


def _queue(callback: Callable[[], None]) -> None:
    # Variable._execution_engine.queue_callback runs a function at the end of the backward in
    # progress, before .backward() returns; DDP and FSDP use it too (checked with torch 2.13).
    # Without it the end could only be guessed at the optimizer's step, after clipping.
    torch.autograd.Variable._execution_engine.queue_callback(callback)
