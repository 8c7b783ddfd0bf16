"""A lower learning rate, of all parameters or of queries and keys alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from stabmon._settings import Bounds
from stabmon._torch.optimizer_adapter import takes_hooks
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.learning_rates import step_hook
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_rows import Rows
from stabmon.projections.locate import trained_rows
from stabmon.projections.master_weights import copies_of
from stabmon.projections.not_applicable import NotApplicable

GIVE_ALL = "give every optimizer to the monitor: optimizer=[one, other]"
Where = Literal["all", "query_key"]


@intervention
@dataclass(frozen=True)
class LowerLearningRate(Intervention):
    """Multiply the learning rate by a factor.

    It applies whatever the scheduler does.

    It slows the growth of scores and does not reverse it, and repairs only where the rate itself
    was the cause. A healthy run pays 0.17 nats at a factor of 0.5, 0.44 at 0.1, and 0.08 at 0.1 for
    queries and keys alone. Clip first.

    ``where="query_key"`` scales the step that the optimizer has just made, on the rows that make
    queries and keys: p = before + factor * (after - before). With every optimizer whose step is
    proportional to the rate this equals a lower rate, weight decay included. It reaches the query
    and key part of a fused projection, as a parameter group of its own cannot, and leaves groups,
    schedulers and checkpoints as they are. It costs a copy of these rows during the step.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> applied = LowerLearningRate(factor=0.25).apply(run)
        >>> run.rate_factor
        0.25
        >>> applied.undo(), run.rate_factor
        (True, 1)
    """

    treats: ClassVar[Mapping[str, int]] = {
        "rate": 20,
        "sustained_growth": 50,
        "scores": 40,
        "step": 20,
        "loss": 20,
    }
    # a tenth of the rate for queries and keys helped where the rate itself was the cause

    cost: ClassVar[float] = 0.17
    affects_whole_run: ClassVar[bool] = True

    factor: Annotated[float, Bounds(above=0, high=1)] = 0.5
    """Factor on the learning rate, in (0, 1]."""
    where: Where = "all"
    """``all`` parameters, or ``query_key``: the attention layers' projections and their norms."""

    def order_for(self, symptom: str) -> int | None:
        scores = ("sustained_growth", "scores", "step")
        return super().order_for(symptom) if self.where == "all" or symptom in scores else None

    def affordable(self, run: TrainingRun, budget: Budget, uses: int) -> bool:
        return self.where == "query_key" or run.rate_factor * self.factor >= budget.min_lr_scale

    def _start(self, run: TrainingRun) -> Effect:
        _ = run.torch_optimizers
        rates = [group.rate for group in run.groups if group.rate is not None]
        if self.where == "all":
            before = run.rates.factor
            undo = run.rates.hold(lambda: self.factor)
            return Held(
                undo_=undo,
                before={"lr": rates, "factor": before},
                after={"factor": before * self.factor},
            )
        rows = _StepScale(run, self.factor)
        return Held(
            places=[(layer, None) for layer in rows.layers],
            undo_=rows.remove,
            before={"lr": rates, "query_key_factor": 1.0},
            after={"query_key_factor": self.factor},
            note=f"holds in {len(rows.layers)} layers"
            + (f"; not in {', '.join(rows.refused)}" if rows.refused else ""),
        )

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return self._start(run)


@dataclass
class Held(Effect):
    """A change that is held until its function ``undo_`` is called."""

    undo_: Callable[[], None] = field(default=lambda: None)
    """Function that ends it."""
    works: Callable[[], bool] = field(default=lambda: False)
    """Function that returns True while it changes a rate."""
    saved: Mapping[str, Any] = field(default_factory=dict)
    """State with which it can be held again after a restart."""

    def release(self) -> None:
        self.undo_()

    def was_active(self) -> bool:
        return self.works()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.saved)


class _StepScale:
    """A factor on each step's change of the query and key rows that are known."""

    def __init__(self, run: TrainingRun, factor: float) -> None:
        self.factor = factor
        self.layers: list[str] = []
        self.refused: list[str] = []
        why: NotApplicable | None = None
        self._places: dict[int, dict[tuple[Any, ...], tuple[Rows, Tensor]]] = {}
        """The rows and copies that each optimizer updates, by the optimizer's id."""
        self._before: dict[int, list[Tensor]] = {}
        optimizers = run.torch_optimizers
        steps = {id(each): group.optimizer for group in run.groups for each in group.parameters}
        for layer in run.known_layers():
            try:
                rows = trained_rows(run.module(layer), run.history.info.get(layer))
                copies = [(each, copies_of(each.parameter, run)) for each in rows]
                by = [
                    next((steps[id(copy)] for copy in own if id(copy) in steps), None)
                    for _, own in copies
                ]
                if any(not takes_hooks(each) for each in by):
                    raise NotApplicable(
                        "an optimizer that was not given updates its queries and keys",
                        GIVE_ALL,
                    )
            except NotApplicable as error:
                self.refused.append(layer)
                why = error.with_traceback(None)
                continue
            self.layers.append(layer)
            for stepping, (each, own) in zip(by, copies, strict=True):
                places = self._places.setdefault(id(stepping), {})
                places |= {(*each.key, id(copy)): (each, copy) for copy in own}
        if not self.layers:
            raise why or NotApplicable("no attention layer is known")
        self._hooks = []
        for optimizer in optimizers:
            if id(optimizer) in self._places:
                self._hooks += [
                    optimizer.register_step_pre_hook(
                        step_hook(functools.partial(self._remember, id(optimizer)))
                    ),
                    optimizer.register_step_post_hook(
                        step_hook(functools.partial(self._scale, id(optimizer)))
                    ),
                ]

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._before = {}

    def _remember(self, optimizer: int) -> None:
        self._before[optimizer] = [
            rows.view(copy).detach().clone() for rows, copy in self._places[optimizer].values()
        ]

    @torch.no_grad()
    def _scale(self, optimizer: int) -> None:
        before = self._before.pop(optimizer, None)
        if before is None:  # both hooks fire twice where a step calls that of its parent class
            return
        for (rows, copy), old in zip(self._places[optimizer].values(), before, strict=True):
            view = rows.view(copy)
            view.copy_(torch.lerp(old, view, self.factor))
