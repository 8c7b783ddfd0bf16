"""Reset an optimizer's moments and warm its rate up, after weights were set back."""

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
"""Names of running averages of gradients in optimizers, and of the step count beside them."""


class OptimizerReset:
    r"""A reset of every optimizer's moments, with a warm-up of the rate.

    The warm-up takes :math:`2 / (1 - \beta_2)` steps, which averages of squares need to fill, but
    no more than have been made. The previous tensors are kept until the next step. In a run without
    a torch optimizer nothing is reset.

    Args:
        run: the run.
        first: the step of the reset, where it is resumed after a restart: then only the rest of the
            warm-up is held.

    References:
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
            self._zero_moments(
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
        """Restore the tensors from before the reset."""
        self.release()
        for entries, name, value in self._saved:
            entries[name] = value
        self._saved = []

    def moved_on(self) -> None:
        """Note an optimizer step, after which the reset can no longer be undone."""
        self._saved = []
        if self._factor() >= 1:
            self._end()

    def release(self) -> None:
        """End the warm-up. May be called twice."""
        self._end()

    def _factor(self) -> float:
        return min(1.0, (self.run.step - self.first + 1) / self.steps)

    def _zero_moments(self, states: list[MutableMapping[str, Any]]) -> None:
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
