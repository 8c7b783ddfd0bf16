"""Moments of an optimizer step, and the interface of everything called at them.

One step of training, with the moments in their order::

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
    """Facts about an optimizer step, as far as they are known at one of its moments."""

    step: int
    """The optimizer step in progress, counted from 1."""
    sampled: bool
    """True for a step whose attention and gradients are measured."""
    forwards: Sequence[ForwardCall] = ()
    """Its forwards so far that can be repeated, with their inputs."""
    losses: Sequence[Tensor] = ()
    """Before the optimizer: the scalar loss of each micro-batch, as far as known."""
    gradient_norm: float | None = None
    """Before the optimizer: L2 norm of all gradients, where it was measured."""
    optimizer: Any = None
    """The optimizer that is about to step; None where only one is known."""
    is_first: bool = True
    """Before the optimizer: True if no other optimizer has stepped in this step."""
    has_new_gradients: bool = True
    """Before the optimizer: True if a forward came since the last optimizer of this step."""
    loss: float | Tensor | None = None
    """At the end: the step's loss; a tensor where reading it would wait for a device."""
    micro_batches: int = 0
    """At the end: the number of forwards whose gradients were added up."""
    was_skipped: bool | Tensor = False
    """At the end: True if the optimizer skipped the step, as a gradient scaler makes it do.

    A tensor, above 0 for True, where reading it would wait for a device.
    """


class StepListener:
    """Base class of everything called at moments of a step; it does nothing.

    A method that raises is counted and logged once; training and the other listeners go on.
    Forwards that a listener makes in :meth:`before_optimizer_step` and :meth:`on_step_end` are not
    recorded as training's.

    Example:
        >>> class Steps(StepListener):
        ...     count = 0
        ...     def on_step_end(self, ctx: StepContext) -> None:
        ...         self.count += 1
        >>> steps = Steps()
        >>> steps.on_step_end(StepContext(step=1, sampled=True))
        >>> steps.count, steps.wants_attention
        (1, False)
    """

    has_news: bool = False
    """True if the step must be judged though it is not sampled; set False when a step begins."""

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
            call: can repeat the forward; None where its inputs were not kept.
            output: the model's output.
        """

    def on_forward_error(self) -> None:
        """Remove everything from the model, after a forward that raised.

        Training may have ended by it, and then nobody calls :meth:`close`.
        """

    def on_backward_end(self) -> None:
        """Handle gradients that are complete and not clipped yet."""

    def before_optimizer_step(self, ctx: StepContext) -> None:
        """Handle gradients, while the weights that made them are still there."""

    def on_step_end(self, ctx: StepContext) -> None:
        """Handle the new weights, before the next forward."""

    def close(self) -> None:
        """Remove every hook; may be called twice."""
