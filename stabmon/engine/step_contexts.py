"""Make the context of each moment of the step in progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.step_observer import StepObserver
from stabmon.listeners import StepContext


class StepContexts:
    """Contexts of a step's moments, and the optimizers that have stepped in it.

    Args:
        observer: forwards, losses and gradients of the step.
        optimizers: the run's optimizers.
        is_sampled: returns whether a step, counted from 1, is a sampled one.
        needs_norm: measure the norm of all gradients before the optimizers of sampled steps.
        boundary: counts what fails.
    """

    def __init__(
        self,
        observer: StepObserver,
        optimizers: OptimizerAdapter,
        is_sampled: Callable[[int], bool],
        needs_norm: bool,
        boundary: ErrorBoundary,
    ) -> None:
        self.boundary = boundary
        self._observer, self._optimizers = observer, optimizers
        self._is_sampled, self._needs_norm = is_sampled, needs_norm
        self._stepped: set[int] = set()
        """Optimizers that are about to step or have, by ``id``, in this step."""
        self._inputs = (0, 0)
        """Forwards and losses of this step when an optimizer was last about to step."""
        self._scales = optimizers.scales
        """A gradient scaler was known at the end of the last step."""

    def start_step(self) -> None:
        """Drop the step that is over."""
        self._stepped.clear()

    def at_begin(self, step: int) -> StepContext:
        """Return the context before a step's first forward."""
        return StepContext(step, self._is_sampled(step))

    def before_optimizer(self, step: int, optimizer: Any) -> StepContext | None:
        """Return the context before an optimizer steps.

        Returns:
            None where the same optimizer steps again without a forward in between: that is one
            step, as where an optimizer's step calls its parent's.
        """
        seen = self._observer
        inputs = (seen.forwards.count, len(seen.losses.parts))
        is_first, has_new = not self._stepped, inputs != self._inputs
        if id(optimizer) in self._stepped and not has_new:
            return None
        self._stepped.add(id(optimizer))
        self._inputs = inputs
        sampled = self._is_sampled(step)
        measured = sampled and self._needs_norm and (is_first or has_new)
        if sampled:
            seen.settle()
        return StepContext(
            step,
            sampled,
            forwards=seen.forwards.calls,
            losses=seen.losses.parts,
            gradient_norm=self._gradient_norm() if measured else None,
            optimizer=optimizer,
            is_first=is_first,
            has_new_gradients=has_new,
        )

    def at_end(self, step: int, loss: Tensor | float | None) -> StepContext:
        """Close the step's capture and loss, and return the context after the optimizers.

        A part that fails leaves the others as they are.

        Args:
            step: the step that has ended.
            loss: its loss, where the training loop has one.
        """
        seen = self._observer
        seen.settle()
        seen.stop_capture()
        micro_batches = len(seen.losses.parts) or seen.forwards.count
        forwards, ended = seen.forwards.calls, self._end_loss(step, loss)
        was_skipped = self._end_scaling()
        return StepContext(
            step,
            self._is_sampled(step),
            forwards=forwards,
            loss=ended,
            micro_batches=micro_batches,
            was_skipped=False if was_skipped is None else was_skipped,
        )

    @contained
    def _gradient_norm(self) -> float | None:
        return self._observer.gradients.get("")

    @contained
    def _end_loss(self, step: int, loss: Tensor | float | None) -> float | Tensor | None:
        shares = self._observer.forwards.shares
        return self._observer.losses.end_step(step, loss, shares=shares)

    @contained
    def _end_scaling(self) -> bool | Tensor:
        """Return whether the step was skipped; drop norms that a scaler changed."""
        was_skipped = self._optimizers.left_out()
        scaled, self._scales = self._scales, self._optimizers.scales
        if scaled != self._scales or (
            was_skipped is True and not math.isfinite(self._observer.gradients.get("", 0.0))
        ):
            # a scale that was not known is in them, or they have changed nothing
            self._observer.drop_gradients()
        return was_skipped
