"""Leave out optimizer steps whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stabmon._settings import Count
from stabmon._storage.stored_value import Stored
from stabmon._torch.tensors import local
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable


@intervention
@dataclass(frozen=True)
class SkipStep(Intervention):
    """From now on, set every gradient to None right before the optimizer's step if any of them is
    NaN or inf, on any rank.

    Optimizers leave a parameter without a gradient alone: values, moments and decay. It must be in
    place before the first bad gradient, as after one step the NaN is in the weights and in every
    later gradient; it costs a look at all gradients and one transfer to the host at each step.
    After ``most`` skipped steps in a row it says once that skipping does not help, and goes on. A
    gradient scaler does the same by itself, so that with one this is refused, or does nothing once
    one is found at work.
    """

    install_at_start: ClassVar[bool] = True
    affects_whole_run: ClassVar[bool] = True

    most: Count = 10

    def _start(self, run: TrainingRun) -> Effect:
        if _scales(run):
            raise NotApplicable("the gradient scaler skips such steps by itself")
        return _Skipping(run, self.most)

    def check_saved(self, effect: Stored) -> None:
        _ = effect["skipped"].integer(), effect["in_a_row"].integer()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        effect = self._start(run)
        assert isinstance(effect, _Skipping)
        effect.skipped, effect.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        return effect


class _Skipping(Effect):
    def __init__(self, run: TrainingRun, most: int) -> None:
        super().__init__(note="looks at every step's gradients")
        self.run, self.most = run, most
        self.skipped = self.in_a_row = 0
        self._at = run.step - 1
        """After which step it skipped last: with several optimizers it is called for each of them
        in a step.
        """
        self._remove = run.step_hooks.add("before_optimizer_step", self._look)

    def release(self) -> None:
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @torch.no_grad()
    def _look(self) -> None:
        owners = [p for p in self._parameters() if p.grad is not None]
        grads = [local(p.grad) for p in owners if p.grad is not None]
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        finite = not grads or bool(
            torch.stack([_finite(grad).to(grads[0].device) for grad in grads]).all()
        )
        if not self.run.any_rank(not finite and not _scales(self.run)):
            if self._at < self.run.step - 1:
                self.in_a_row = 0
            return
        for parameter in owners:
            parameter.grad = None
        if self._at == self.run.step:
            return
        self.in_a_row = self.in_a_row + 1 if self._at == self.run.step - 1 else 1
        self._at = self.run.step
        self.skipped += 1
        if self.in_a_row in (1, self.most):
            why = "a gradient is not finite"
            more = (
                ""
                if self.in_a_row == 1
                else f"{self.most} steps in a row: skipping does not help, mend what makes them"
            )
            record = {
                "intervention": "skip_step",
                "action": "skipped",
                "step": self.run.step + 1,
                "layer": None,
                "head": None,
            }
            self.run.audit(
                {
                    **record,
                    "before": {},
                    "after": {"skipped": self.skipped},
                    "why": why,
                    "note": more,
                }
            )

    def _parameters(self) -> list[torch.Tensor]:
        stepped = [parameter for group in self.run.groups for parameter in group.parameters]
        return stepped or list(self.run.model.parameters())


def _scales(run: TrainingRun) -> bool:
    """Whether a gradient scaler is at work."""
    return run.grad_scaler is not None and bool(run.grad_scaler.is_enabled())


def _finite(grad: torch.Tensor) -> torch.Tensor:
    """One flag on the gradient's own device."""
    return grad.isfinite().all()
