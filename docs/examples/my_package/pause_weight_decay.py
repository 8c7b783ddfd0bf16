"""An intervention: train without weight decay for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stabmon.interventions.base import Intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable


@dataclass(frozen=True)
class PauseWeightDecay(Intervention):
    """Set the weight decay of every parameter group to 0 while this is held."""

    treats: ClassVar[Mapping[str, int]] = {"uniform": 10}

    def _start(self, run: TrainingRun) -> Effect:
        groups = _groups(run)
        decays = [float(group.get("weight_decay", 0.0)) for group in groups]
        if not any(decays):
            raise NotApplicable("no parameter group has weight decay")
        return _Paused(groups, decays)

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Paused(_groups(run), state["decays"])


class _Paused(Effect):
    """Weight decay that is 0 until it is released."""

    def __init__(self, groups: Sequence[dict[str, Any]], decays: Sequence[float]) -> None:
        super().__init__(
            before={"weight_decay": list(decays)},
            after={"weight_decay": 0.0},
            resources=frozenset(["weight decay"]),
        )
        self._groups, self._decays = groups, decays
        for group in groups:
            group["weight_decay"] = 0.0

    def release(self) -> None:
        for group, decay in zip(self._groups, self._decays, strict=False):
            group["weight_decay"] = decay
        self._groups = ()

    def state_dict(self) -> dict[str, Any]:
        return {"decays": list(self._decays)}


def _groups(run: TrainingRun) -> list[dict[str, Any]]:
    return [group for optimizer in run.torch_optimizers for group in optimizer.param_groups]
