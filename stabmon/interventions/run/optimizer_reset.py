"""Let an optimizer begin anew on weights that are those of a fresh model: without what it knew of
gradients, and with a warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from stabmon._torch.optimizer_adapter import state_of
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable

MOMENTS = (
    *(
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "mu_product",
        "momentum_buffer",
        "step",
    ),
    *(
        "square_avg",
        "grad_avg",
        "acc_delta",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "row_var",
        "col_var",
        "variance",
    ),
)
"""What optimizers call running averages of gradients, and the count of steps that corrects their
bias.
"""


class OptimizerReset:
    r"""Every moment of the optimizers set to where training begins, and the rate warmed up.

    The warm-up takes :math:`2 / (1 - \beta_2)` steps, which is what averages of squares need to
    fill, but no more than have been made. The tensors of before are kept until training has moved
    on. A run without a torch optimizer has nothing to forget.

    Args:
        run: the run.
        first: the step at which it began, where it is taken up again after a restart: then only
            what is left of the warm-up is held.

    Source:
        Ma & Yarats 2019, arXiv:1910.04209 (untuned linear warm-up of Adam).
    """

    def __init__(self, run: TrainingRun, first: int | None = None) -> None:
        self.run, self.first = run, run.step if first is None else first
        self.steps = max(1, self.first)
        self._saved: list[tuple[MutableMapping[str, Any], str, Any]] = []
        self._end: Callable[[], None] = lambda: None
        try:
            _ = run.torch_optimizers
        except NotApplicable:
            return
        squares = [group.settings["betas"][1] for group in run.groups if "betas" in group.settings]
        if squares:
            self.steps = max(1, min(self.steps, round(2 / (1 - min(float(max(squares)), 0.99999)))))
        if first is None:
            self._forget(
                [
                    entries
                    for each in run.optimizers
                    for entries in state_of(each).values()
                    if entries
                ]
            )
        if self._factor() < 1:
            self._end = run.rates.hold(self._factor, ramp=True)

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
        return min(1.0, (self.run.step - self.first + 1) / self.steps)

    def _forget(self, states: list[MutableMapping[str, Any]]) -> None:
        for entries in states:
            for name in MOMENTS:
                if name in entries:
                    value, start = entries[name], 1.0 if name == "mu_product" else 0.0
                    self._saved.append((entries, name, value))
                    entries[name] = (
                        torch.full_like(value, start)
                        if isinstance(value, Tensor)
                        else type(value)(start)
                    )
