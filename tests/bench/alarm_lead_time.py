"""Measure how long before a failure stabmon raises an alarm, on real small runs.

python tests/bench/alarm_lead_time.py                      both testbeds: some hours on two cores
python tests/bench/alarm_lead_time.py --testbed byte_gpt   146 byte-level GPTs (or own, or both)
python tests/bench/alarm_lead_time.py --left-out           risk fitted without the recipe's family
python tests/bench/alarm_lead_time.py --peers VENV/bin/python   also trainspotter and trainpulse
python tests/bench/alarm_lead_time.py --only init --half tuned   some kinds, one half, of the own

Every run is trained once, read at each step, and kept in ``--out``. Alarms are then raised again
from these readings by the rules, the risk and the schedules as they are shipped (the same code that
runs in training). Outcomes come from losses alone: a run has failed if its loss ends above that of
its healthy paired run (or rises for good, or is not finite), attention was the cause if the same
run with attention's growth taken away does not fail, and the onset is where the gap stays open. An
alarm is the first issue of severity error or above. The shipped risk was fitted on runs of these
testbeds: ``--left-out`` fits it anew for each eighth of the families, on the others.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from stabmon.risk import RiskModel
from tests.bench.byte_gpt.cases import watched_runs as byte_gpt_runs
from tests.bench.causes import RIGHT
from tests.bench.detectors import BESIDE, Alarm, Detector, peers, stabmon_at
from tests.bench.fit_risk import labelled, left_out_models
from tests.bench.replay import Sampling
from tests.bench.row_tables import print_side_by_side, share, write_rows
from tests.bench.testbed.bench import chosen, options
from tests.bench.testbed.cases import watched_runs as own_runs
from tests.bench.watched_run import WatchedRun

INTERVALS = (5, 10, 20, 50)
SAMPLINGS = [
    Sampling(every, schedule) for schedule in ("fixed", "adaptive") for every in (5, 20, 50)
]


@dataclass(frozen=True)
class Row:
    """One run and its first alarm."""

    detector: str
    testbed: str
    run: str
    kind: str
    label: str
    at_start: bool
    has_fault: bool
    fault_step: int
    onset: int | None
    alarm: int | None
    """Step of the first alarm."""
    lead: int | None
    """Steps from the alarm to the onset; negative for one that comes late."""
    type: str | None
    where: str | None
    cause: str | None
    of_attention: bool | None
    cause_right: bool | None
    """None where no cause is right, as in a run without a fault."""
    layer_right: bool | None
    """True if the alarm names a layer with the fault; None where all have it, or none."""

    @property
    def before_onset(self) -> bool:
        return self.lead is not None and self.lead > 0


def row(name: str, run: WatchedRun, alarm: Alarm | None) -> Row:
    right = RIGHT.get(run.kind)
    judged = alarm is not None and alarm.cause and run.label in ("attention", "other")
    return Row(
        name,
        run.testbed,
        run.name,
        run.kind,
        run.label,
        run.at_start,
        run.has_fault,
        run.fault_step,
        run.onset,
        alarm and alarm.step,
        run.onset - alarm.step if alarm and run.onset else None,
        alarm and alarm.type,
        alarm and alarm.where,
        alarm and alarm.cause,
        alarm and alarm.of_attention,
        alarm.cause in right if alarm and judged and right else None,
        bool({*alarm.layers} & {*run.faulty_layers})
        if alarm and alarm.layers and run.faulty_layers
        else None,
    )


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """Summarise the first alarms of one detector."""
    attention = [each for each in rows if each.label == "attention"]
    other = [each for each in rows if each.label == "other"]
    healthy = [each for each in rows if each.label == "healthy"]
    mid = [each for each in attention if not each.at_start]
    text = {}
    for words, of in (
        ("failed by attention", attention),
        ("  wrong from the start", [each for each in attention if each.at_start]),
        ("  in mid-run", mid),
    ):
        never = sum(each.alarm is None for each in of)
        soon = sum(each.before_onset for each in of)
        text[f"{words}: alarmed"] = share(len(of) - never, len(of))
        text[f"{words}: before the onset"] = share(soon, len(of))
        text[f"{words}: late / never"] = f"{len(of) - never - soon} / {never}"
    leads = [each for each in mid if each.before_onset]
    text["  lead in mid-run, steps"] = _spread([each.lead or 0 for each in leads], "{:.0f}")
    shares = [(each.lead or 0) / (each.onset or 1) for each in leads]
    text["  of the steps to the onset"] = _spread(shares, "{:.2f}")
    early = [each for each in attention + other if each.alarm is not None]
    text["alarmed before the fault"] = share(
        sum((each.alarm or 0) < each.fault_step for each in early), len(early)
    )
    for words, of in (
        ("healthy, nothing wrong: alarmed", [each for each in healthy if not each.has_fault]),
        ("healthy, with a fault: alarmed", [each for each in healthy if each.has_fault]),
        ("failed otherwise: alarmed", other),
    ):
        text[words] = share(sum(each.alarm is not None for each in of), len(of))
    text["failed otherwise: attention blamed"] = share(
        sum(bool(each.of_attention) for each in other), len(other)
    )
    for words, verdicts in (
        ("first cause right", [each.cause_right for each in rows]),
        ("  of failures by attention", [each.cause_right for each in attention]),
        ("layer with the fault named", [each.layer_right for each in rows]),
    ):
        known = [each for each in verdicts if each is not None]
        text[words] = share(sum(known), len(known))
    return text


def _spread(values: Sequence[float], form: str) -> str:
    if not len(values):
        return ""
    middle, low = np.median(values), np.quantile(values, 0.1)
    return f"median {form.format(middle)}, p10 {form.format(low)}"


def judge(
    runs: Sequence[WatchedRun],
    models: dict[str, RiskModel],
    beside: dict[str, Detector],
    processes: int,
) -> list[Row]:
    """Return the first alarm of each detector in each run.

    Args:
        runs: what to judge.
        models: the risk for each run, by title; empty for the shipped one.
        beside: detectors beside stabmon that cannot be sent to another process.
        processes: runs judged at a time.
    """
    found = [row(name, run, detect(run, [])) for run in runs for name, detect in beside.items()]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_judge_one, run, models.get(run.title)) for run in runs]
        for each in tqdm(waiting, desc="judging", unit="run", disable=None):
            found += each.result()
    return found


def _judge_one(run: WatchedRun, model: RiskModel | None) -> list[Row]:
    torch.set_num_threads(1)
    readings = run.readings()
    detectors = {str(sampling): stabmon_at(sampling, model) for sampling in SAMPLINGS} | BESIDE
    return [row(name, run, detect(run, readings)) for name, detect in detectors.items()]


def main() -> int:
    """Print the tables and write the per-run one.

    Returns the exit status: 0, since aims are reported, not enforced.
    """
    args = _arguments()
    runs = collect(args)
    models: dict[str, RiskModel] = {}
    if args.left_out:
        models = left_out_models([labelled(each) for each in runs if each.label != "unclear"])
    beside = peers(args.peers, runs) if args.peers else {}
    rows = judge(runs, models, beside, args.jobs)
    report(rows)
    path = args.out / f"alarms-{args.testbed}{'-left-out' if args.left_out else ''}.csv"
    write_rows(rows, path)
    return 0


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--testbed", choices=["own", "byte_gpt", "both"], default="both")
    parser.add_argument(
        "--recipes", nargs="+", default=(), metavar="NAME", help="recipes of byte_gpt"
    )
    parser.add_argument(
        "--left-out", action="store_true", help="judge each run by a risk fitted without its family"
    )
    parser.add_argument(
        "--peers", type=Path, help="interpreter of an environment with trainspotter and trainpulse"
    )
    return parser.parse_args()


def collect(args: argparse.Namespace) -> list[WatchedRun]:
    """Train the missing runs of the chosen testbeds, and return all."""
    found: list[WatchedRun] = []
    if args.testbed != "own":
        found += byte_gpt_runs(args.out / "byte_gpt", args.jobs, args.recipes)
    if args.testbed != "byte_gpt":
        found += own_runs(chosen(args), args.out, args.jobs)
    return found


def report(rows: Sequence[Row]) -> None:
    """Print runs, the detectors side by side, and the schedules side by side."""
    names = list(dict.fromkeys(each.detector for each in rows))
    ours = [str(sampling) for sampling in SAMPLINGS]
    first = ours[0]
    beside = [first, *(name for name in names if name not in ours)]
    for testbed in dict.fromkeys(each.testbed for each in rows):
        of = [each for each in rows if each.testbed == testbed]
        _print_runs([each for each in of if each.detector == first], f"{testbed} ({first})")
        _print_summaries(of, beside, f"{testbed}, beside others")
        _print_summaries(of, ours, f"{testbed}, at other intervals")


def _print_summaries(rows: Sequence[Row], names: Sequence[str], title: str) -> None:
    print_side_by_side(
        {name: summary([each for each in rows if each.detector == name]) for name in names}, title
    )


def _print_runs(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    shown = ("run", "kind", "label", "fault_step", "onset", "alarm", "lead")
    shown += ("type", "where", "cause", "cause_right")
    for name in shown:
        table.add_column(name, overflow="fold")
    for each in sorted(rows, key=lambda each: each.label):
        if each.label != "healthy" or each.alarm is not None:
            values = json.loads(json.dumps([getattr(each, name) for name in shown]))
            table.add_row(*("" if value is None else str(value) for value in values))
    Console(width=max(150, Console().width)).print(table)


if __name__ == "__main__":
    sys.exit(main())
