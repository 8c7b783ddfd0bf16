"""Limits of what may be done to one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stabmon._settings import Bounds, Count, check, renamed


@renamed(
    acts="max_interventions",
    per_place="max_per_location",
    rollbacks="max_rollbacks",
    least_rate="min_lr_scale",
    hold="release_after",
)
@dataclass(frozen=True)
class Budget:
    """Limits of what may be done to one run. Samples are sampled optimizer steps."""

    max_interventions: Annotated[int, Bounds(0)] = 20
    """Interventions in a run."""
    max_per_location: Annotated[int, Bounds(0)] = 3
    """Interventions on one head, or on the run as a whole for one kind of issue."""
    max_rollbacks: Annotated[int, Bounds(0)] = 3
    """Rollbacks in a run."""
    min_lr_scale: Annotated[float, Bounds(above=0, high=1)] = 0.05
    """Lowest share of the scheduled learning rate that interventions may leave."""
    patience: Count = 4
    """Samples after which an intervention is judged by whether its alarm is still open."""
    release_after: Count = 20
    """Samples without an alarm after which an intervention that is held is ended, if it had nothing
    to do in them, and loosened if it had.
    """

    def __post_init__(self) -> None:
        check(self, key="budget")
