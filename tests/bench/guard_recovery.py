"""Measure how "guard" repairs failing runs and leaves healthy ones alone.

python tests/bench/guard_recovery.py              two runs of each kind, about half an hour
python tests/bench/guard_recovery.py --every 10   sample, and intervene after, every tenth step
python tests/bench/guard_recovery.py --all        train under guard also runs without an alarm

Each run without and with it, beside its healthy paired run. alarm_lead_time.py trains the runs
unguarded. A run is repaired if its final validation loss is within 0.10 nats of the paired run's.
The fault continues under guard: weights scaled at each step are scaled at each step under guard
too. Runs without an alarm get no intervention, and such a run under guard is bit for bit the run
without it (tests/guard/test_guarding.py), so it counts as it was, unless ``--all`` asks to train it. The
order and the targets of the interventions were set on the tuned half of the runs (``--half tuned``)
and on others before; what is printed is the other half.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import csv
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.alarm_lead_time import share
from tests.bench.testbed.alarms import alarms_of
from tests.bench.testbed.bench import chosen, options, run_all
from tests.bench.testbed.cases import Case, cases, healthy_paired_runs
from tests.bench.testbed.outcome import MARGIN, outcome
from tests.bench.testbed.trainer import Run

INTERVALS = (5, 10, 20, 50)


@dataclass(frozen=True)
class Row:
    """One run, without and with guard."""

    run: str
    cause: str
    final: float
    """Validation loss without guard."""
    guarded: float
    """Validation loss with guard."""
    paired: float
    gap: float
    gap_guarded: float
    repaired: bool
    interventions: str
    """Applied interventions, with their numbers."""
    taken_back: int
    """Interventions undone or released, by the audit."""
    audited: int
    """Records in the audit."""
    first_act: int | None


def row(case: Case, guarded: Run) -> Row:
    after = outcome(guarded, case.paired)
    did = Counter(record["action"] for record in guarded.records)
    interventions = Counter(
        record["intervention"] for record in guarded.records if record["action"] == "applied"
    )
    interventions.pop("skip_step", None)  # in place from the start
    if did["skipped"]:
        interventions["skip_step"] = did["skipped"]
    steps = [
        record["step"]
        for record in guarded.records
        if record["action"] in ("applied", "skipped") and record["step"]
    ]
    return Row(
        run=case.recipe.name,
        cause=case.cause,
        final=round(case.run.validation, 3),
        guarded=round(guarded.validation, 3),
        paired=round(case.paired.validation, 3),
        gap=round(case.outcome.gap, 3),
        gap_guarded=round(after.gap, 3),
        repaired=not after.failed,
        interventions=", ".join(f"{name} x{count}" for name, count in interventions.items()),
        taken_back=did["undone"] + did["released"],
        audited=len(guarded.records),
        first_act=min(steps, default=None),
    )


def main() -> int:
    """Print the tables and write the per-run one.

    Returns the exit status: 0, since aims are reported, not enforced.
    """
    parser = options(__doc__, INTERVALS)
    parser.add_argument(
        "--all", action="store_true", help="train under guard also what gave no alarm"
    )
    args = parser.parse_args()
    found = cases(chosen(args), args.out, args.jobs)
    found += healthy_paired_runs(found)
    alarmed = [
        args.all or case.outcome.failed or bool(alarms_of(case, args.every)) for case in found
    ]
    trained = iter(
        run_all(
            [
                (c.recipe, "guard", args.every)
                for c, each in zip(found, alarmed, strict=True)
                if each
            ],
            args.out,
            args.jobs,
        )
    )
    guarded = [
        next(trained) if each else case.run for case, each in zip(found, alarmed, strict=True)
    ]
    rows = [row(case, run) for case, run in zip(found, guarded, strict=True)]
    table = Table(
        title=f"{args.half} runs under guard, one step in {args.every} looked at",
        title_justify="left",
    )
    for name in asdict(rows[0]):
        table.add_column(name, overflow="fold")
    for each in rows:
        if each.cause != "none" or each.interventions:
            table.add_row(*("" if value is None else str(value) for value in asdict(each).values()))
    console = Console(width=max(170, Console().width))
    console.print(table)
    for cause, words in (("attention", "failed by attention"), ("other", "failed otherwise")):
        of = [each for each in rows if each.cause == cause]
        print(f"{words}: repaired {share(sum(each.repaired for each in of), len(of))}; {_gaps(of)}")
    well = [each for each in rows if each.cause == "none"]
    cost = [each.guarded - each.final for each in well if math.isfinite(each.guarded)]
    worse = [each for each in well if not each.guarded - each.final <= MARGIN / 5]
    print(
        f"healthy: {sum(bool(each.interventions) for each in well)} of {len(well)} had interventions; "
        "guard changed the final loss by "
        f"{np.median(cost):+.3f} nats (median), {max(cost):+.3f} (worst); worse by more than "
        f"{MARGIN / 5:g}: {len(worse)}"
    )
    if failing := [run.recipe.name for run in guarded if run.errors]:
        print(f"stabmon failed inside in {', '.join(failing)}")
    path = args.out / f"cure-{args.half}-every{args.every}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(each) for each in rows)
    print(f"every run: {path}")
    return 0


def _gaps(rows: Sequence[Row]) -> str:
    before, after = [each.gap for each in rows], [each.gap_guarded for each in rows]
    return (
        f"gap to the paired run {np.median(before):.2f} -> {np.median(after):.2f} nats (median)"
        if rows
        else ""
    )


if __name__ == "__main__":
    sys.exit(main())
