"""Every recipe watched at each step, with its outcome."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from tests.bench.byte_gpt.model import ByteGPT
from tests.bench.byte_gpt.outcome import outcome
from tests.bench.byte_gpt.recipe import Recipe
from tests.bench.byte_gpt.recipes import has_fault, kind_of, recipes
from tests.bench.byte_gpt.runs import Job, readings_of, run_all
from tests.bench.byte_gpt.train import SEED, make_optimizer
from tests.bench.watched_run import WatchedRun


def watched_job(recipe: Recipe, seed: int = SEED) -> Job:
    """Return the job of a run that is watched at each step."""
    return Job(recipe, seed, "observe", 1, (("schedule", "fixed"),))


def with_others(names: Sequence[str]) -> list[Recipe]:
    """Return the named recipes, and those that their runs are held against."""
    found = recipes()
    chosen = [found[name] for name in names]
    beside = {other for each in chosen for other in (each.paired, each.without_growth) if other}
    return chosen + [found[name] for name in sorted(beside - set(names))]


def watched_runs(
    folder: Path, processes: int, names: Sequence[str] = (), seed: int = SEED
) -> list[WatchedRun]:
    """Train the recipes that are missing in a folder, and return all with their outcomes.

    Args:
        folder: where runs are kept.
        processes: runs trained at a time.
        names: recipes; empty for all.
        seed: of weights and batches.
    """
    chosen = with_others(names or list(recipes()))
    jobs = {recipe.name: watched_job(recipe, seed) for recipe in chosen}
    runs = run_all(list(jobs.values()), folder, processes)
    losses = {run.recipe.name: run.losses for run in runs}
    found = []
    for recipe in chosen[: len(names) or None]:
        became = outcome(recipe, losses)
        found.append(
            WatchedRun(
                testbed="byte_gpt",
                name=recipe.name,
                family=recipe.family,
                kind=kind_of(recipe),
                label=became.label,
                onset=became.onset,
                at_start=recipe.at_start,
                fault_step=recipe.fault_step,
                has_fault=has_fault(recipe),
                losses=losses[recipe.name],
                readings=functools.partial(readings_of, jobs[recipe.name], folder),
                groups=groups_of(recipe),
            )
        )
    return found


@functools.cache
def groups_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the optimizer's groups, in order."""
    groups = make_optimizer(recipe, ByteGPT(recipe, SEED)).param_groups
    return tuple(group["name"] for group in groups)
