"""Let an optimizer forget what it has learned of its gradients."""

from __future__ import annotations

from collections.abc import MutableMapping
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


class FreshMoments:
    """Every moment of the optimizer set to where training begins; the tensors of before are kept until training has moved on.

    A run without a torch optimizer has none to forget.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._saved: list[tuple[MutableMapping[str, Any], str, Any]] = []
        try:
            state = run.torch_optimizer.state
        except CannotApply:
            return
        for entries in state.values():
            for name in MOMENTS:
                if name not in entries:
                    continue
                self._saved.append((entries, name, entries[name]))
                start = 1.0 if name == "mu_product" else 0.0
                value = entries[name]
                entries[name] = torch.full_like(value, start) if isinstance(value, Tensor) else type(value)(start)

    def undo(self) -> None:
        """Put back the very tensors of before."""
        for entries, name, value in self._saved:
            entries[name] = value
        self._saved = []

    def moved_on(self) -> None:
        """The optimizer has stepped: there is nothing to put back any more."""
        self._saved = []
