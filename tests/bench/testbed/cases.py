"""Every recipe with its outcome: whether and when it failed, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from testbed.bench import run_all
from testbed.outcome import Outcome, outcome
from testbed.recipes import Recipe
from testbed.trainer import Run

Cause = Literal["attention", "other", "none"]
EVERY = 5
"""Steps between readings as they are kept; alarms can be raised again from every reading, or from
fewer.
"""


@dataclass(frozen=True, eq=False)
class Case:
    """One watched run, beside its twin."""

    run: Run
    twin: Run
    outcome: Outcome
    cause: Cause
    """``attention`` where the same run with attention's growth taken away does not fail; ``none``
    where it did not fail.
    """

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def start(self) -> int:
        """The step from which something is done to it; 0 from the beginning."""
        return int(self.recipe.settings.get("start", 0))

    @property
    def at_start(self) -> bool:
        """Whether it was ill from its first steps on, so that an alarm is no foresight."""
        return self.start <= 1


def cases(recipes: Sequence[Recipe], folder: Path, processes: int) -> list[Case]:
    """Train every recipe watched, its twin watched too, and the failing ones' counterfactuals."""
    everything = [
        (each, "observe", EVERY) for each in (*recipes, *(recipe.healthy() for recipe in recipes))
    ]
    done = run_all(everything, folder, processes)
    runs, twins = done[: len(recipes)], done[len(recipes) :]
    outcomes = [outcome(run, twin) for run, twin in zip(runs, twins, strict=True)]
    failed = [recipe for recipe, each in zip(recipes, outcomes, strict=True) if each.failed]
    counter = [(each.without_growth(), None, 1) for each in failed] + [
        (each.healthy().without_growth(), None, 1) for each in failed
    ]
    more = run_all(counter, folder, processes)
    cured = {
        recipe.name: not outcome(run, twin).failed
        for recipe, run, twin in zip(failed, more[: len(failed)], more[len(failed) :], strict=True)
    }
    found = []
    for recipe, run, twin, each in zip(recipes, runs, twins, outcomes, strict=True):
        cause: Cause = "none" if not each.failed else "attention" if cured[recipe.name] else "other"
        found.append(Case(run, twin, each, cause))
    return found


def healthy_twins(found: Sequence[Case]) -> list[Case]:
    """The twins as cases of their own, where they are other runs than those they are compared
    with.
    """
    own = [
        case
        for case in found
        if case.twin.recipe != case.recipe and math.isfinite(case.twin.validation)
    ]
    return [Case(case.twin, case.twin, outcome(case.twin, case.twin), "none") for case in own]
