"""Measure how long before a failure stabmon raises an alarm, on real small runs.

python tests/bench/alarm_lead_time.py               two runs of each kind, 40 minutes on two cores
python tests/bench/alarm_lead_time.py --each 4      four of each
python tests/bench/alarm_lead_time.py --only init   some kinds
python tests/bench/alarm_lead_time.py --half tuned  the half for tuning levels on

Every run is trained watched at each fifth step, and so is its healthy paired run; alarms are then
raised again from the readings of every ``--every``-th step, by the rules and the configuration as
they are shipped (the same code that runs in training). A run has failed if its final validation
loss is not finite or lies 0.10 nats above its paired run's; attention was the cause if the same run
with attention's growth taken away does not fail. The onset of a failure is where the gap between
the two first stays open. Levels of rules were set on one half of the runs (and on others before);
what is printed is the other half. Runs are kept in ``--out`` and not trained twice.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.stats
from rich.console import Console
from rich.table import Table

from tests.bench.testbed.alarms import BASELINES, Alarm, alarms_of
from tests.bench.testbed.bench import chosen, options
from tests.bench.testbed.cases import Case, cases, healthy_paired_runs

ATTENTION = (
    "entropy_collapse",
    "logit_growth",
    "overflow_risk",
    "precision_insufficient",
    "attention_spike",
    "high_curvature",
)
INTERVALS = (5, 10, 20, 50)
Judge = Callable[[Case, int], list[Alarm]]


@dataclass(frozen=True)
class Row:
    """One run and its first alarm."""

    run: str
    kind: str
    shape: str
    failed: bool
    cause: str
    gap: float
    onset: int | None
    fault_step: int
    alarm: int | None
    """Step of the first alarm after the fault."""
    early: int | None
    """Step of an alarm before the fault: a false one."""
    lead: int | None
    type: str | None
    where: str | None
    layer_right: bool | None
    """True if the alarm's layer is one with the fault; None where all were."""
    type_right: bool | None
    """For attention: a type of attention's. Otherwise: none of these."""


def row(case: Case, judge: Judge, every: int) -> Row:
    recipe, alarms = case.recipe, judge(case, every)
    early = next((a for a in alarms if a.step < case.start), None)
    first = next((a for a in alarms if a.step >= case.start), None)
    layers = recipe.settings.get("layers")
    onset = case.outcome.onset
    return Row(
        run=recipe.name,
        kind=recipe.kind,
        shape=f"{recipe.shape.family} L{recipe.shape.layers} H{recipe.shape.heads} "
        f"d{recipe.shape.width} S{recipe.shape.length}",
        failed=case.outcome.failed,
        cause=case.cause,
        gap=round(case.outcome.gap, 3),
        onset=onset,
        fault_step=case.start,
        alarm=None if first is None else first.step,
        early=None if early is None else early.step,
        lead=None if first is None or onset is None else onset - first.step,
        type=None if first is None else first.type,
        where=None if first is None else first.where,
        layer_right=None
        if first is None or layers is None or first.layer is None
        else first.layer in layers,
        type_right=None if first is None else _type_right(case, first),
    )


def _type_right(case: Case, alarm: Alarm) -> bool:
    of_queries_and_keys = alarm.type == "update_spike" and alarm.layer is not None
    names_attention = alarm.type in ATTENTION or of_queries_and_keys
    return names_attention if case.cause == "attention" else not names_attention


def share(hits: int, of: int) -> str:
    """Format a share with its exact 95% interval."""
    if not of:
        return "none to judge"
    low, high = scipy.stats.binomtest(hits, of).proportion_ci(method="exact")
    return f"{hits}/{of} = {hits / of:.2f} ({low:.2f} to {high:.2f})"


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """Summarise the alarms of one set of rules."""
    attention = [r for r in rows if r.cause == "attention"]
    mid, start = (
        [r for r in attention if r.fault_step > 1],
        [r for r in attention if r.fault_step <= 1],
    )
    other, healthy = [r for r in rows if r.cause == "other"], [r for r in rows if not r.failed]
    leads = [r for r in mid if r.lead is not None]
    text = {
        "attention failures alarmed": share(
            sum(r.alarm is not None for r in attention), len(attention)
        ),
        "  in mid-run": share(sum(r.alarm is not None for r in mid), len(mid)),
        "  in mid-run, before the onset": share(sum((r.lead or 0) > 0 for r in mid), len(mid)),
        "  at initialisation": share(sum(r.alarm is not None for r in start), len(start)),
        "other failures alarmed": share(sum(r.alarm is not None for r in other), len(other)),
        "healthy runs alarmed": share(
            sum(r.alarm is not None or r.early is not None for r in healthy), len(healthy)
        ),
        "failing runs alarmed before anything was done": share(
            sum(r.early is not None for r in attention + other), len(attention + other)
        ),
    }
    if leads:
        steps = [r.lead or 0 for r in leads]
        shares = [(r.lead or 0) / max(1, (r.onset or 1) - r.fault_step) for r in leads]
        whole = [(r.lead or 0) / max(1, r.onset or 1) for r in leads]
        text["lead in mid-run, steps"] = f"median {np.median(steps):.0f}, worst {min(steps)}"
        text["  of the steps before the onset"] = f"median {np.median(whole):.2f}"
        text["  of the steps between cause and onset"] = f"median {np.median(shares):.2f}"
    named = [r for r in attention if r.type_right is not None]
    text["attention named where it was the cause"] = share(
        sum(bool(r.type_right) for r in named), len(named)
    )
    placed = [r for r in attention if r.layer_right is not None]
    text["attributed layer is one with the fault"] = share(
        sum(bool(r.layer_right) for r in placed), len(placed)
    )
    spared = [r for r in other if r.type_right is not None]
    text["no attention named where it was not the cause"] = share(
        sum(bool(r.type_right) for r in spared), len(spared)
    )
    return text


def main() -> int:
    """Print the tables and write the per-run ones.

    Returns the exit status: 0, since aims are reported, not enforced.
    """
    args = options(__doc__, INTERVALS).parse_args()
    found = cases(chosen(args), args.out, args.jobs)
    found += healthy_paired_runs(found)
    judges: dict[str, Judge] = {"stabmon": alarms_of, **BASELINES}
    rows = {
        name: [row(case, judge, args.every) for case in found] for name, judge in judges.items()
    }
    _print_runs(rows["stabmon"])
    figures = {name: summary(each) for name, each in rows.items()}
    table = Table(
        title=f"{args.half} runs, one step in {args.every} looked at", title_justify="left"
    )
    table.add_column("95% intervals in brackets")
    for name in figures:
        table.add_column(name)
    for line in figures["stabmon"]:
        table.add_row(line, *(figures[name].get(line, "") for name in figures))
    console = Console(width=max(150, Console().width))
    console.print(table)
    confusion = Table(title="confusion (stabmon)", title_justify="left")
    for name in ("what became of it", "runs", "alarm", "no alarm"):
        confusion.add_column(name, justify="left" if name.startswith("what") else "right")
    for cause, words in (
        ("attention", "failed by attention"),
        ("other", "failed otherwise"),
        ("none", "healthy"),
    ):
        of = [r for r in rows["stabmon"] if r.cause == cause]
        hit = sum(r.alarm is not None or (cause == "none" and r.early is not None) for r in of)
        confusion.add_row(words, str(len(of)), str(hit), str(len(of) - hit))
    console.print(confusion)
    rest = Table(title="the same at other intervals (stabmon)", title_justify="left")
    lines = list(figures["stabmon"])[:6]
    for name in ("every", *lines):
        rest.add_column(name.strip())
    for every in INTERVALS:
        figure = summary([row(case, alarms_of, every) for case in found])
        rest.add_row(str(every), *(figure[line] for line in lines))
    console.print(rest)
    path = args.out / f"foresight-{args.half}-every{args.every}"
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["judge", *asdict(rows["stabmon"][0])])
        writer.writeheader()
        writer.writerows({"judge": name, **asdict(r)} for name, each in rows.items() for r in each)
    print(f"every run: {path}.csv")
    return 0


def _print_runs(rows: Sequence[Row]) -> None:
    table = Table(title="runs (stabmon)", title_justify="left")
    shown = (
        "run",
        "shape",
        "cause",
        "gap",
        "fault_step",
        "onset",
        "alarm",
        "lead",
        "type",
        "where",
        "early",
    )
    for name in shown:
        table.add_column(name, overflow="fold")
    for r in rows:
        if r.cause != "none" or r.alarm is not None or r.early is not None or not r.run:
            table.add_row(
                *("" if (value := getattr(r, name)) is None else str(value) for name in shown)
            )
    Console(width=max(150, Console().width)).print(table)


if __name__ == "__main__":
    sys.exit(main())
