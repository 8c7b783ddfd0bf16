"""Fire the moments of an optimizer step to the listeners, in one fixed order."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stabmon._torch.callbacks.finish import finish
from stabmon._torch.forward_call import ForwardCall
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.listeners import StepContext, StepListener
from stabmon.records import AttentionCall


class Phase(enum.Enum):
    """The state of a monitor."""

    NEW = "new"
    """The sinks are not open, and nothing is in the model."""
    TRAINING = "training"
    """Forwards and backwards are those of training."""
    OWN_WORK = "own work"
    """stabmon itself runs the model (a replay, a proof): nothing is recorded."""
    CLOSED = "closed"
    """The model is as it was found."""


class StepClock:
    """Listeners in a fixed order, all called at each moment of a step.

    Args:
        boundary: counts failures, by listener and moment.
        listeners: in the order of their calls; they are closed in reverse order.

    Example:
        >>> clock = StepClock(ErrorBoundary(), [StepListener()])
        >>> clock.phase = Phase.TRAINING
        >>> with clock.own_work():
        ...     clock.is_recording
        False
        >>> clock.is_recording
        True
    """

    def __init__(self, boundary: ErrorBoundary, listeners: Sequence[StepListener] = ()) -> None:
        self.boundary = boundary
        self.listeners = list(listeners)
        self.phase = Phase.NEW

    @property
    def is_recording(self) -> bool:
        """Return whether a forward that begins now belongs to training."""
        return self.phase is not Phase.OWN_WORK

    @property
    def has_news(self) -> bool:
        """Return whether a listener needs the step judged though it is not sampled."""
        return any(listener.has_news for listener in self.listeners)

    @property
    def wants_attention(self) -> bool:
        """Return whether a listener needs the attention calls of the next forward."""
        return any(listener.wants_attention for listener in self.listeners)

    @property
    def wants_backward_end(self) -> bool:
        """Return whether a listener needs the end of the backward in this step."""
        return any(listener.wants_backward_end for listener in self.listeners)

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Mark forwards inside as stabmon's own: they are not recorded as training's."""
        before, self.phase = self.phase, Phase.OWN_WORK
        try:
            yield
        finally:
            if self.phase is Phase.OWN_WORK:  # a listener may have closed the monitor
                self.phase = before

    def reset_news(self) -> None:
        """Drop the news of the step that is over."""
        for listener in self.listeners:
            listener.has_news = False

    def on_step_begin(self, ctx: StepContext) -> None:
        """Fire the moment before a step's first forward."""
        self._fire(lambda listener: listener.on_step_begin(ctx), "on_step_begin")

    def on_attention(self, call: AttentionCall) -> None:
        """Fire an attention call of a training forward."""
        self._fire(lambda listener: listener.on_attention(call), "on_attention")

    def on_forward_end(self, call: ForwardCall | None, output: Any) -> None:
        """Fire the return of an outermost training forward."""
        self._fire(lambda listener: listener.on_forward_end(call, output), "on_forward_end")

    def on_forward_error(self) -> None:
        """Fire that a training forward raised."""
        self._fire(lambda listener: listener.on_forward_error(), "on_forward_error")

    def on_backward_end(self) -> None:
        """Fire the end of a backward."""
        self._fire(lambda listener: listener.on_backward_end(), "on_backward_end")

    def before_optimizer_step(self, ctx: StepContext) -> None:
        """Fire the moment before an optimizer steps."""
        with self.own_work():
            self._fire(
                lambda listener: listener.before_optimizer_step(ctx), "before_optimizer_step"
            )

    def on_step_end(self, ctx: StepContext) -> None:
        """Fire the moment after the optimizers have stepped."""
        with self.own_work():
            self._fire(lambda listener: listener.on_step_end(ctx), "on_step_end")

    def close(self) -> None:
        """Close the listeners, the last first."""
        self.phase = Phase.CLOSED
        for listener in reversed(self.listeners):
            place = f"{type(listener).__name__}.close"
            with self.boundary.timed():
                finish(listener.close, functools.partial(self.boundary.failed, place))

    def _fire(self, call: Callable[[StepListener], None], moment: str) -> None:
        for listener in self.listeners:
            with self.boundary.timed():
                try:
                    call(listener)
                except Exception as error:
                    self.boundary.failed(f"{type(listener).__name__}.{moment}", error)
