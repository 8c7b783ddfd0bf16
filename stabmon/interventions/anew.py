"""Let an optimizer begin anew on weights that are those of a fresh model: without what it knew of gradients, and with a warm-up."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stabmon.interventions.base import CannotApply

if TYPE_CHECKING:
    from stabmon.interventions.run import TrainingRun

MOMENTS = (
    *(
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "mu_product",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
    ),
    *("exp_avg_sq_row", "exp_avg_sq_col", "step"),
)
"""What optimizers call running averages of gradients, and the count of steps that corrects their bias."""


class Anew:
    """Every moment of the optimizer set to where training begins, and the rate warmed up over as many steps as have been made.

    The tensors of before are kept until training has moved on. A run without a torch optimizer has nothing to forget.

    Args:
        run: the run.
        first: the step at which it began, where it is taken up again after a restart: then only what is left of the warm-up is held.
    """

    def __init__(self, run: TrainingRun, first: int | None = None) -> None:
        self.run, self.first = run, run.step if first is None else first
        self._saved: list[tuple[MutableMapping[str, Any], str, Any]] = []
        self._end: Callable[[], None] = lambda: None
        try:
            state = run.torch_optimizer.state
        except CannotApply:
            return
        if first is None:
            self._forget([entries for entries in state.values() if entries])
        if self._factor() < 1:
            self._end = run.rates.hold(self._factor)

    def undo(self) -> None:
        """Put back the very tensors of before."""
        self.release()
        for entries, name, value in self._saved:
            entries[name] = value
        self._saved = []

    def moved_on(self) -> None:
        """The optimizer has stepped: there is nothing to put back any more."""
        self._saved = []
        if self._factor() >= 1:
            self._end()

    def release(self) -> None:
        """End the warm-up. May be called twice."""
        self._end()

    def _factor(self) -> float:
        return min(1.0, (self.run.step - self.first + 1) / max(1, self.first))

    def _forget(self, states: list[MutableMapping[str, Any]]) -> None:
        for entries in states:
            for name in MOMENTS:
                if name in entries:
                    value, start = entries[name], 1.0 if name == "mu_product" else 0.0
                    self._saved.append((entries, name, value))
                    entries[name] = torch.full_like(value, start) if isinstance(value, Tensor) else type(value)(start)
