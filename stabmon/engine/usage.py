"""Warn of a run in which something will never be measured, each time once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon._torch.process_group import rank
from stabmon.listeners import StepContext, StepListener

logger = logging.getLogger("stabmon")
_UNREPORTED = {"optimizer steps": 100, "forwards": 1000}
"""Moments without a single ``on_step`` after which the call is taken to be missing."""
_SAMPLES_SUGGESTED = 10
"""Samples that a suggested ``log_every`` gives."""


class Usage(StepListener):
    """Counts of the moments of a run, and the warnings of a wrong use of stabmon.

    Args:
        model: the model that trains.
        optimizers: the run's optimizers.
        log_every: sample every N-th optimizer step.
        is_sampled: returns whether a step, counted from 1, is a sampled one; of one that is still
            to come, whether it or one before it is.
        framework: ``transformers``, ``lightning`` or ``loop``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizerAdapter,
        log_every: int,
        is_sampled: Callable[[int], bool],
        framework: str,
    ) -> None:
        self._model, self._optimizers = model, optimizers
        self._log_every, self._is_sampled, self._framework = log_every, is_sampled, framework
        self._steps = self._samples = 0
        self._unreported = dict.fromkeys(_UNREPORTED, 0)
        self._said: set[str] = set()

    def expect_end(self, step: int, last_step: int | None) -> None:
        """Warn if no step that is still to come is sampled.

        Args:
            step: optimizer steps made so far.
            last_step: the last optimizer step of the run; None for a dry run, of any length.
        """
        if last_step is None:
            self._said.add("unsampled")
            return
        coming = range(step + 1, last_step + 1)
        if coming and not any(map(self._is_sampled, coming)):
            self._warn_unsampled(f"the run ends at step {last_step}", len(coming))

    def on_forward_end(self, call: ForwardCall | None, output: Any) -> None:
        """Count a training forward."""
        self._note("forwards")

    def before_optimizer_step(self, ctx: StepContext) -> None:
        """Count an optimizer's step."""
        self._note("optimizer steps")

    def on_step_end(self, ctx: StepContext) -> None:
        """Count a step; at the first, look at the optimizers."""
        self._steps += 1
        self._samples += ctx.sampled
        if self._steps == 1:
            self._check_optimizers()

    def close(self) -> None:
        """Warn if nothing was measured; not after an exception, which has ended the run early."""
        if sys.exc_info()[0] is not None:
            return
        if not self._steps:
            self._warn_unreported(1)
        elif not self._samples:
            self._warn_unsampled(f"the run had {self._steps} optimizer steps", self._steps)

    def used_after_close(self) -> None:
        """Warn that a step was reported to a monitor that is closed."""
        self._warn(
            "closed",
            "stabmon's monitor is closed and measures nothing any more: call on_step before "
            "close(), or make a new monitor for this training",
        )

    def _note(self, moment: str) -> None:
        if not self._steps:
            self._unreported[moment] += 1
            if self._unreported[moment] == _UNREPORTED[moment]:
                self._warn_unreported(_UNREPORTED[moment])

    def _warn_unreported(self, least: int) -> None:
        """Warn that no step was reported, if some moment was seen so many times."""
        seen = [f"{count} {moment}" for moment, count in self._unreported.items() if count >= least]
        if seen:
            mend = {
                "loop": "call monitor.on_step(loss) once after each optimizer step",
                "lightning": "under manual optimization step the optimizers of self.optimizers()",
            }.get(self._framework, "let the trainer step its own optimizer")
            self._warn(
                "unreported",
                f"stabmon has seen {' and '.join(seen)}, and no step was reported to it, so that "
                f"nothing is measured: {mend}",
            )

    def _warn_unsampled(self, length: str, steps: int) -> None:
        fitting = max(1, steps // _SAMPLES_SUGGESTED)
        self._warn(
            "unsampled",
            f"stabmon measures attention at no step: log_every={self._log_every} and {length}; "
            f"set log_every={fitting}",
        )

    def _check_optimizers(self) -> None:
        """Warn without an optimizer, or of one that steps none of the model's parameters."""
        optimizers = self._optimizers.optimizers
        if not optimizers:
            self._warn(
                "optimizer",
                "stabmon was given no optimizer: learning rates and updates are not measured, "
                "failing batches are not replayed before the step, and no intervention can act on "
                "the rate; give optimizer=...",
            )
            return
        stepped = [each for group in self._optimizers.groups() for each in group.parameters]
        own = {id(each) for each in self._model.parameters()}
        if not stepped or any(id(each) in own for each in stepped):
            return
        # a mixed-precision or sharding library steps copies: of another dtype, or flattened
        dtypes = {each.dtype for each in self._model.parameters()}
        if any(each.ndim > 1 and each.dtype in dtypes for each in stepped):
            self._warn(
                "optimizer",
                f"stabmon was given an optimizer of another model: none of its {len(stepped)} "
                f"parameters is one of {type(self._model).__name__}'s, so that updates are not "
                "measured and interventions on the rate do not reach the model; make the optimizer "
                "from this model's parameters(), after the model is moved or wrapped",
            )

    def _warn(self, about: str, text: str) -> None:
        if about not in self._said and rank() == 0:
            logger.warning("%s", text)
        self._said.add(about)
