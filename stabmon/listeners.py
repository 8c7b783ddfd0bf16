"""The moments of an optimizer step, and the interface of everything that acts at them.

One step of training, with the moments in the order in which they come::

    on_step_begin(ctx)            wait for forwards
      forward                     on_attention(call) for each attention call
      on_forward_end(...)         the outermost forward has returned
      backward
      on_backward_end()           gradients are complete, and not clipped yet
      ...                         more micro-batches
    before_optimizer_step(ctx)    once for each optimizer that is about to step
      optimizer.step()
    on_step_end(ctx)              weights are new, the next forward has not begun

:class:`~stabmon.engine.clock.StepClock` fires them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabmon._torch.forward_call import ForwardCall
from stabmon.records import AttentionCall


@dataclass(frozen=True, eq=False)
class StepContext:
    """The facts of one optimizer step, as far as they are known at one of its moments."""

    step: int
    """The optimizer step under way, counted from 1."""
    sampled: bool
    """The step is a sampled one."""
    forwards: Sequence[ForwardCall] = ()
    """Its forwards so far, as they can be repeated."""
    losses: Sequence[Tensor] = ()
    """Before the optimizer: the loss of each micro-batch, as far as known."""
    gradient_norm: float | None = None
    """Before the optimizer: L2 norm of all gradients, where it was measured."""
    optimizer: Any = None
    """The optimizer that is about to step; None where only one is known."""
    is_first: bool = True
    """No other optimizer has stepped in this step."""
    has_new_gradients: bool = True
    """A forward was made since this was last fired in the same step."""
    loss: float | Tensor | None = None
    """At the end: the step's loss; a tensor where reading it would wait for a device."""
    micro_batches: int = 0
    """At the end: the number of forwards whose gradients were added up."""
    was_skipped: bool | Tensor = False
    """At the end: the optimizer left the step out, as under a gradient scaler."""


class StepListener:
    """Base class of what acts at moments of a step; each method does nothing unless overridden.

    A method that raises is counted and logged once; training and the other listeners go on.
    """

    has_news: bool = False
    """The step showed something that must be judged though it is not sampled; reset at each step."""

    @property
    def wants_attention(self) -> bool:
        """Return whether :meth:`on_attention` is needed in the next training forward."""
        return False

    @property
    def wants_backward_end(self) -> bool:
        """Return whether :meth:`on_backward_end` is needed in the step that begins."""
        return False

    def on_step_begin(self, ctx: StepContext) -> None:
        """Prepare for a step, before its first forward."""

    def on_attention(self, call: AttentionCall) -> None:
        """Handle one attention call of a training forward."""

    def on_forward_end(self, call: ForwardCall | None, output: Any) -> None:
        """Handle an outermost training forward that returned ``output``.

        Args:
            call: repeats the forward; None where its inputs were not kept.
            output: what the model returned.
        """

    def on_forward_error(self) -> None:
        """Remove everything from the model: a forward raised, and nobody may come to close."""

    def on_backward_end(self) -> None:
        """Handle gradients that are complete and not clipped yet."""

    def before_optimizer_step(self, ctx: StepContext) -> None:
        """Handle gradients, while the weights that made them are still there."""

    def on_step_end(self, ctx: StepContext) -> None:
        """Handle the new weights, before the next forward."""

    def close(self) -> None:
        """Remove every hook; may be called twice."""
