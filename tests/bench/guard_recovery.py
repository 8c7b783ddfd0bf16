"""Does "guard" repair what fails, and leave alone what does not? Each run without and with it,
beside its healthy twin.

    python tests/bench/guard_recovery.py                 two runs of each kind, about half an hour after
    alarm_lead_time.py has trained them unguarded python tests/bench/guard_recovery.py --every 10      look at, and
    act after, every tenth step python tests/bench/guard_recovery.py --all           train under guard also
    what gave no alarm

A run is repaired if its final validation loss is within 0.10 nats of the twin's. What is done to a
run goes on being done: weights that are scaled at each step are scaled at each step under guard
too. What gave no alarm is not acted on, and a run under guard that is not acted on is bit for bit
the run without it (tests/test_guarding.py), so it counts as it was, unless ``--all`` says to see
for oneself. The order and the targets of the acts were set on the tuned half of the runs (``--half
tuned``) and on others before; what is printed is the other half.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from alarm_lead_time import INTERVALS, share
from rich.console import Console
from rich.table import Table
from testbed.alarms import alarms_of
from testbed.bench import chosen, options, run_all
from testbed.cases import Case, cases, healthy_twins
from testbed.outcome import MARGIN, outcome
from testbed.trainer import Run


@dataclass(frozen=True)
class Row:
    """One run, without and with guard."""

    run: str
    cause: str
    final: float
    """Validation loss without guard."""
    guarded: float
    """With it."""
    twin: float
    gap: float
    gap_guarded: float
    repaired: bool
    acts: str
    """What was applied, how often."""
    taken_back: int
    """Undone or let go, as the audit says."""
    audited: int
    """Records in the audit."""
    first_act: int | None


def row(case: Case, guarded: Run) -> Row:
    after = outcome(guarded, case.twin)
    did = Counter(record["action"] for record in guarded.records)
    acts = Counter(
        record["intervention"] for record in guarded.records if record["action"] == "applied"
    )
    acts.pop("skip_step", None)  # in place from the start
    if did["skipped"]:
        acts["skip_step"] = did["skipped"]
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
        twin=round(case.twin.validation, 3),
        gap=round(case.outcome.gap, 3),
        gap_guarded=round(after.gap, 3),
        repaired=not after.failed,
        acts=", ".join(f"{name} x{count}" for name, count in acts.items()),
        taken_back=did["undone"] + did["released"],
        audited=len(guarded.records),
        first_act=min(steps, default=None),
    )


def main() -> int:
    """Print the tables and write the per-run one. Returns the exit status: 0, since aims are told,
    not enforced.
    """
    parser = options(__doc__, INTERVALS)
    parser.add_argument(
        "--all", action="store_true", help="train under guard also what gave no alarm"
    )
    args = parser.parse_args()
    found = cases(chosen(args), args.out, args.jobs)
    found += healthy_twins(found)
    ill = [args.all or case.outcome.failed or bool(alarms_of(case, args.every)) for case in found]
    trained = iter(
        run_all(
            [(c.recipe, "guard", args.every) for c, each in zip(found, ill, strict=True) if each],
            args.out,
            args.jobs,
        )
    )
    guarded = [next(trained) if each else case.run for case, each in zip(found, ill, strict=True)]
    rows = [row(case, run) for case, run in zip(found, guarded, strict=True)]
    table = Table(
        title=f"{args.half} runs under guard, one step in {args.every} looked at",
        title_justify="left",
    )
    for name in asdict(rows[0]):
        table.add_column(name, overflow="fold")
    for each in rows:
        if each.cause != "none" or each.acts:
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
        f"healthy: {sum(bool(each.acts) for each in well)} of {len(well)} were acted on; guard "
        "changed the final loss by "
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
        f"gap to the twin {np.median(before):.2f} -> {np.median(after):.2f} nats (median)"
        if rows
        else ""
    )


if __name__ == "__main__":
    sys.exit(main())
