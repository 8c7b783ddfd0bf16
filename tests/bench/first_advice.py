"""Measure how many failing runs are repaired by carrying out the advice of their first alarm.

python tests/bench/first_advice.py                   every failing recipe of byte_gpt: some hours
python tests/bench/first_advice.py --recipes lr.03   some of them
python tests/bench/first_advice.py --every 5 --schedule fixed    alarms of another sampling

For each recipe that fails, the first alarm's advice is carried out as a user would who reads it and
nothing else: a rate is set to the rate that it names, for the groups that it names; scores are
clipped or normalised; the initialisation, the scale or the format is put right; what drives weights
or batches is looked for and taken out. Then the run starts again. It is repaired if the mean of its
last 50 losses is within 0.10 nats of its healthy paired run's, or of the counterfactual's.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stabmon.records import StabilityIssue
from tests.bench.byte_gpt.cases import watched_job, watched_runs, with_others
from tests.bench.byte_gpt.outcome import LAST
from tests.bench.byte_gpt.recipe import Recipe
from tests.bench.byte_gpt.recipes import recipes
from tests.bench.byte_gpt.runs import Job, run_all
from tests.bench.causes import OF_ATTENTION, part_of
from tests.bench.replay import Sampling, alarms
from tests.bench.row_tables import share, write_rows
from tests.bench.watched_run import WatchedRun

REPAIRED = 0.10
"""Nats above the paired run or the counterfactual within which a run is repaired."""
LOWER = 0.5
"""Factor of a rate that is to be lowered by no number."""
DATA = ("random_batch", "random_labels")
"""Faults of batches and labels, found by who looks at these."""
WRITTEN = {
    "weights": ("query_key",),
    "embedding": ("embedding", "embedding_nan"),
    "mlp": ("mlp",),
    "head": (),
}
"""Faults that write to the weights of a part, and are found by who looks for what does."""


@dataclass(frozen=True)
class Row:
    """One failing run, and the run in which its first advice was carried out."""

    run: str
    kind: str
    label: str
    alarm: int | None
    type: str | None
    change: str
    """Settings that the advice changed; empty where it changes none."""
    gap: float
    """Nats above the paired run over the last 50 steps; inf where it ended early."""
    gap_after: float
    gap_to_counterfactual: float
    """The same after the change, above the run without attention's growth; NaN without one."""
    repaired: bool


def change(recipe: Recipe, issue: StabilityIssue, groups: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a recipe that an issue's advice changes.

    Args:
        recipe: the failing recipe.
        issue: its first alarm.
        groups: parts of the model in the optimizer's groups, in order.
    """
    kind, evidence = issue.issue_type, issue.evidence
    if kind == "update_spike":
        return _of_rates(recipe, issue, groups)
    if kind == "logit_growth" and evidence.get("how") == "driven":
        return _of_driver(recipe, str(evidence["by"]))
    if evidence.get("from_the_start"):
        return {"query_key_init": 1.0, "scale": 1.0}
    if kind in ("overflow_risk", "precision_insufficient"):
        # a softmax that overflows needs nothing else; scores that outgrew a format go on growing
        rest = {} if "exp_dtype" in evidence else {"qk_norm": True}
        return {"precision": "float32"} | rest
    if kind in OF_ATTENTION:
        return {"qk_norm": True}
    if kind == "weight_jump":
        return {"faults": _without(recipe, *WRITTEN[part_of(issue.layer or "")])}
    if kind == "non_finite":
        return _of_non_finite(recipe, issue)
    if kind == "gradient_explosion":
        return {"clip": float(evidence["recent_median"])}
    if kind == "loss_spike" and evidence.get("cause") == "data":
        return {"faults": _without(recipe, *DATA)}
    if kind == "loss_spike":
        return {"rate": LOWER * recipe.rate, "faults": _without(recipe, "random_batch")}
    return {}


def _of_rates(recipe: Recipe, issue: StabilityIssue, groups: Sequence[str]) -> dict[str, Any]:
    evidence: Mapping[str, Any] = issue.evidence
    if issue.layer is not None:
        return {}
    if evidence.get("how") == "decay":
        return {"faults": _without(recipe, "weight_decay")}
    if evidence.get("how") == "ahead":
        multiple = min(evidence["fitting_multiples"].values())
        return {"query_key_rate": multiple, "query_key_rate_from": 0}
    named = evidence.get("fitting_rates") or evidence.get("highest_rates_before") or {}
    rates = {groups[int(key.rpartition(".")[2])]: rate for key, rate in named.items()}
    if len(set(rates.values())) > 1 or 0 < len(rates) < len(groups):
        return {"rate_caps": tuple(sorted(rates.items()))}
    fitting = evidence.get("fitting_rate") or evidence.get("highest_rate_before")
    return {"rate_caps": tuple((name, float(fitting)) for name in groups)} if fitting else {}


def _of_driver(recipe: Recipe, what: str) -> dict[str, Any]:
    """Take out what multiplies the scale, or the weights of queries and keys."""
    if what == "scale":
        return {"scale_ramp": None, "scale": 1.0}
    return {"query_key_rate": 1.0, "faults": _without(recipe, "query_key", "weight_decay")}


def _of_non_finite(recipe: Recipe, issue: StabilityIssue) -> dict[str, Any]:
    cause = issue.evidence.get("cause")
    if cause == "overflow":
        return {"precision": "float32"}
    if cause == "weights":
        # look for the code that wrote them
        return {"faults": _without(recipe, *WRITTEN[part_of(issue.layer or "")])}
    return {"rate": LOWER * recipe.rate} if cause == "optimizer" else {}


def _without(recipe: Recipe, *names: str) -> tuple[Any, ...]:
    return tuple(fault for fault in recipe.faults if fault.name not in names)


def carried_out(run: WatchedRun, sampling: Sampling) -> tuple[StabilityIssue | None, Recipe | None]:
    """Return the first alarm of a failing run, and its recipe after the advice.

    None for no alarm, and for an advice that changes nothing of this recipe.
    """
    recipe = recipes()[run.name]
    first = next(alarms(run.readings(), sampling), None)
    if first is None:
        return None, None
    changed = replace(recipe, **change(recipe, first[0], run.groups))
    return first[0], None if changed == recipe else changed


def judged(
    runs: Sequence[WatchedRun],
    losses: Mapping[str, np.ndarray],
    sampling: Sampling,
    train: Callable[[Sequence[Recipe]], list[np.ndarray]],
) -> list[Row]:
    """Carry out the first advice of each failing run.

    Args:
        runs: the failing runs.
        losses: losses by recipe, those of paired runs and counterfactuals included.
        sampling: the monitor's schedule.
        train: returns the losses of recipes.
    """
    alarmed = [carried_out(run, sampling) for run in runs]
    changed = [recipe for _, recipe in alarmed if recipe is not None]
    new = [recipe for recipe in changed if _known_as(recipe) not in losses]
    trained = {recipe.name: each for recipe, each in zip(new, train(new), strict=True)}
    rows = []
    for run, (issue, recipe) in zip(runs, alarmed, strict=True):
        own = recipes()[run.name]
        after = losses[run.name]
        if recipe is not None:
            known = _known_as(recipe)
            after = trained[run.name] if known not in losses else losses[known]
        gap = _gap(after, losses[own.paired], own.steps)
        other = math.nan
        if own.without_growth:
            other = _gap(after, losses[own.without_growth], own.steps)
        settings = asdict(own)
        rows.append(
            Row(
                run.name,
                run.kind,
                run.label,
                issue and issue.step,
                issue and issue.issue_type,
                ", ".join(
                    f"{name} {value}"
                    for name, value in (asdict(recipe) if recipe else settings).items()
                    if value != settings[name]
                ),
                round(_gap(losses[run.name], losses[own.paired], own.steps), 3),
                round(gap, 3),
                round(other, 3),
                gap < REPAIRED or other < REPAIRED,
            )
        )
    return rows


def _known_as(recipe: Recipe) -> str:
    """Return the name of a recipe that trains the same run; empty where there is none."""
    names = {"name": "", "paired": "", "without_growth": ""}
    plain = replace(recipe, **names)
    same = (name for name, each in recipes().items() if replace(each, **names) == plain)
    return next(same, "")


def _gap(losses: np.ndarray, other: np.ndarray, steps: int) -> float:
    """Return the mean of the last losses above another run's; inf where a run ended early."""
    if min(len(losses), len(other)) < steps or not np.isfinite(losses[-LAST:]).all():
        return math.inf
    return float(losses[-LAST:].mean() - other[-LAST:].mean())


def report(rows: Sequence[Row]) -> None:
    """Print each run, and counts by kind of failure."""
    table = Table(title="runs after the first advice", title_justify="left")
    for name in asdict(rows[0]):
        table.add_column(name, overflow="fold")
    for each in rows:
        table.add_row(*("" if value is None else str(value) for value in asdict(each).values()))
    Console(width=max(150, Console().width)).print(table)
    for words, label in (("failed by attention", "attention"), ("failed otherwise", "other")):
        of = [each for each in rows if each.label == label]
        said = share(sum(each.alarm is not None for each in of), len(of))
        print(f"{words}: alarmed {said}; repaired {share(sum(e.repaired for e in of), len(of))}")
        for kind in dict.fromkeys(each.kind for each in of):
            alike = [each for each in of if each.kind == kind]
            print(f"  {kind}: {share(sum(each.repaired for each in alike), len(alike))}")


def main() -> int:
    """Print the tables and write the per-run one.

    Returns the exit status: 0, since aims are reported, not enforced.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--every", type=int, default=50, help="log_every of the monitor")
    parser.add_argument("--schedule", choices=["adaptive", "fixed"], default="adaptive")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/testbed"), help="where runs and tables are kept"
    )
    args = parser.parse_args()
    folder = args.out / "byte_gpt"
    runs = watched_runs(folder, args.jobs, args.recipes)
    beside = with_others([run.name for run in runs])
    kept = run_all([watched_job(recipe) for recipe in beside], folder, args.jobs)
    losses = {run.recipe.name: run.losses for run in kept}

    def train(chosen: Sequence[Recipe]) -> list[np.ndarray]:
        return [run.losses for run in run_all([Job(each) for each in chosen], folder, args.jobs)]

    failed = [run for run in runs if run.label in ("attention", "other")]
    rows = judged(failed, losses, Sampling(args.every, args.schedule), train)
    report(rows)
    path = args.out / "first_advice.csv"
    write_rows(rows, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
