"""One watched run of a testbed with its outcome, whichever testbed it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stabmon.records import Reading

Label = Literal["attention", "other", "healthy", "unclear"]
"""Failed by attention, failed otherwise, healthy, or between failed and healthy."""


@dataclass(frozen=True, eq=False)
class WatchedRun:
    """One run, its outcome, and how to get at the readings of all its steps."""

    testbed: Literal["own", "byte_gpt"]
    name: str
    family: str
    """Name that it shares with runs so like it that none may be both fitted on and judged."""
    kind: str
    """Fault of the recipe."""
    label: Label
    onset: int | None
    """First step of the failure, counted from 1; None where there is none."""
    at_start: bool
    """Wrong from the first step, so that no alarm can be a forecast."""
    fault_step: int
    """Step before which nothing is wrong; 0 for a fault from the start or none."""
    has_fault: bool
    """Something is wrong with the recipe, whatever became of the run."""
    losses: np.ndarray
    """``[steps]`` training losses."""
    readings: Callable[[], list[Reading]]
    """Returns a reading of each step."""
    groups: tuple[str, ...] = ()
    """Parts of the model in the optimizer's groups, in order; empty where they are not parts."""
    faulty_layers: tuple[str, ...] = ()
    """Layers with the fault; empty where it is in all of them or in none."""

    @property
    def title(self) -> str:
        return f"{self.testbed}/{self.name}"
