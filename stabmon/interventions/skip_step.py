"""No optimizer step with gradients that are not finite."""

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
    """Skip optimizer steps whose gradients are NaN or inf.

    One such gradient on one rank is enough. Where gradients were the same on all ranks at the first
    sampled step, to the bit, each rank looks at its own; else ranks ask each other at each step.

    Right before the step all gradients are set to None. Optimizers do not change a parameter
    without a gradient: neither value nor moments, and no weight decay.

    It must be in place before the first non-finite gradient: after one step the NaN is in the
    weights and in every later gradient. It costs one read of all gradients and one transfer to the
    host at each step. After ``most`` skipped steps in a row it reports once that skipping does not
    help, and goes on. A gradient scaler skips such steps itself: with one this is refused, or does
    nothing once one is found at work.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> run = TrainingRun(model, optimizer)
        >>> applied = SkipStep().apply(run)
        >>> model(torch.full((1, 2), float("nan"))).sum().backward()
        >>> run.step_hooks.fire("before_optimizer_step")
        >>> optimizer.step()
        >>> bool(model.weight.isfinite().all()), applied.effect.skipped
        (True, 1)
    """

    install_at_start: ClassVar[bool] = True
    affects_whole_run: ClassVar[bool] = True

    most: Count = 10
    """Skipped steps in a row after which it reports that skipping does not help."""

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
    """The check of all gradients before every step."""

    def __init__(self, run: TrainingRun, most: int) -> None:
        super().__init__(note="looks at every step's gradients")
        self.run, self.most = run, most
        self.skipped = self.in_a_row = 0
        self._at = run.step - 1
        """Number of optimizer steps made before the newest skipped one.

        With several optimizers the check runs for each of them within a step.
        """
        self._remove = run.step_hooks.add("before_optimizer_step", self._check)

    def release(self) -> None:
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @torch.no_grad()
    def _check(self) -> None:
        owners = [p for p in self._parameters() if p.grad is not None]
        grads = [local(p.grad) for p in owners if p.grad is not None]
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        finite = not grads or bool(
            torch.stack([_finite(grad).to(grads[0].device) for grad in grads]).all()
        )
        bad = not finite and not _scales(self.run)
        exchange = self.run.exchange
        if exchange is not None and exchange.together and not exchange.equal_gradients:
            bad = exchange.needs_end = self.run.any_rank(bad)
        if not bad:
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
                else f"{self.most} steps in a row: skipping does not help, repair the cause"
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
    """Return whether a gradient scaler is at work."""
    return run.grad_scaler is not None and bool(run.grad_scaler.is_enabled())


def _finite(grad: torch.Tensor) -> torch.Tensor:
    """Return one flag on the gradient's own device: True if all of it is finite."""
    return grad.isfinite().all()
