"""Every recipe with its outcome: whether and when it failed, and why."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stabmon.records import Reading
from tests.bench.testbed.bench import kept, run_all
from tests.bench.testbed.models import attention_modules, build
from tests.bench.testbed.outcome import Outcome, outcome
from tests.bench.testbed.recipes import Recipe
from tests.bench.testbed.trainer import Run
from tests.bench.watched_run import WatchedRun

Cause = Literal["attention", "other", "none"]
EVERY = 1
"""Steps between kept readings; alarms can be raised from every one or from fewer."""


@dataclass(frozen=True, eq=False)
class Case:
    """One watched run beside its paired run without the fault."""

    run: Run
    paired: Run
    outcome: Outcome
    cause: Cause
    """Cause of the failure; ``none`` where the run did not fail.

    ``attention`` where the same run with attention's growth taken away does not fail.
    """

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def start(self) -> int:
        """Return the step of the fault; 0 for one from the beginning."""
        return int(self.recipe.settings.get("start", 0))

    @property
    def at_start(self) -> bool:
        """Return whether the run was unstable from its first steps on.

        An alarm is then no forecast.
        """
        return self.start <= 1


def cases(recipes: Sequence[Recipe], folder: Path, processes: int) -> list[Case]:
    """Train every recipe, its paired run, and the failing ones' counterfactuals."""
    everything = [
        (each, "observe", EVERY) for each in (*recipes, *(recipe.healthy() for recipe in recipes))
    ]
    done = run_all(everything, folder, processes)
    runs, paired_runs = done[: len(recipes)], done[len(recipes) :]
    outcomes = [outcome(run, paired) for run, paired in zip(runs, paired_runs, strict=True)]
    failed = [recipe for recipe, each in zip(recipes, outcomes, strict=True) if each.failed]
    counter = [(each.without_growth(), None, 1) for each in failed] + [
        (each.healthy().without_growth(), None, 1) for each in failed
    ]
    more = run_all(counter, folder, processes)
    repaired = {
        recipe.name: not outcome(run, paired).failed
        for recipe, run, paired in zip(
            failed, more[: len(failed)], more[len(failed) :], strict=True
        )
    }
    found = []
    for recipe, run, paired, each in zip(recipes, runs, paired_runs, outcomes, strict=True):
        cause: Cause = (
            "none" if not each.failed else "attention" if repaired[recipe.name] else "other"
        )
        found.append(Case(run, paired, each, cause))
    return found


def healthy_paired_runs(found: Sequence[Case]) -> list[Case]:
    """Return the paired runs as cases of their own, where they are distinct runs."""
    own = [
        case
        for case in found
        if case.paired.recipe != case.recipe and math.isfinite(case.paired.validation)
    ]
    return [
        Case(case.paired, case.paired, outcome(case.paired, case.paired), "none") for case in own
    ]


def watched_runs(recipes: Sequence[Recipe], folder: Path, processes: int) -> list[WatchedRun]:
    """Train recipes and their healthy paired runs, and return all with their outcomes."""
    found = cases(recipes, folder, processes)
    paired = [_watched(case, folder, "paired ") for case in healthy_paired_runs(found)]
    return [_watched(case, folder) for case in found] + paired


def _readings(recipe: Recipe, folder: Path) -> list[Reading]:
    return kept((recipe, "observe", EVERY), folder).readings


def _watched(case: Case, folder: Path, prefix: str = "") -> WatchedRun:
    recipe = case.recipe
    names = [name for name, _ in attention_modules(build(recipe.shape)[0])]
    return WatchedRun(
        testbed="own",
        name=prefix + recipe.name,
        family=recipe.kind,
        kind="none" if recipe.fault == "none" else recipe.kind,
        label="healthy" if case.cause == "none" else case.cause,
        onset=case.outcome.onset,
        at_start=case.at_start,
        fault_step=case.start,
        has_fault=recipe.fault not in ("none", "other_text"),
        losses=case.run.losses,
        readings=functools.partial(_readings, recipe, folder),
        faulty_layers=tuple(names[at] for at in recipe.settings.get("layers") or ()),
    )
