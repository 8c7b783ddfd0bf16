"""Measure how guard and other mitigations repair failing runs and leave healthy ones alone.

python tests/bench/guard_recovery.py                      both testbeds: some hours on two cores
python tests/bench/guard_recovery.py --testbed byte_gpt   146 byte-level GPTs (or own, or both)
python tests/bench/guard_recovery.py --recipes lr.1 ramp.1 base   some of them
python tests/bench/guard_recovery.py --every 50           the interval of a quiet run
python tests/bench/guard_recovery.py --under guard zclip  some mitigations

Each run without and with a mitigation, beside its healthy paired run on the same batches and, where
attention may be the cause, beside its counterfactual (the same run with attention's growth taken
away). The fault continues under the mitigation: a rate that the loop sets at each step is set at
each step. A run is repaired if its loss ends within 0.10 nats of the paired run's or of the
counterfactual's, and harmed if it ends more than 0.05 nats above what it was without. Losses are
those of the last 50 steps of the byte-level GPTs, and of held-back text in the other testbed.

Beside guard: ZClip (arXiv:2504.02507), the gradient clipped at half of the usual norm, queries and
keys normalised from the start, and Kimi K2's clip of every head whose score exceeds 100.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.alarm_lead_time import INTERVALS
from tests.bench.byte_gpt import runs as byte_gpt
from tests.bench.byte_gpt.cases import watched_job, with_others
from tests.bench.byte_gpt.outcome import LAST, outcome
from tests.bench.byte_gpt.recipes import recipes
from tests.bench.references.mitigations import MITIGATIONS
from tests.bench.row_tables import print_side_by_side, share, write_rows
from tests.bench.testbed import bench as own
from tests.bench.testbed.cases import cases
from tests.bench.watched_run import Label

REPAIRED, HARMED = 0.10, 0.05
"""Nats above the paired run to which a run is repaired, and above itself from which it is harmed."""
UNDER = ("guard", *MITIGATIONS, "qk_norm")


@dataclass(frozen=True)
class Row:
    """One run under one mitigation."""

    under: str
    testbed: str
    run: str
    label: Label
    at_start: bool
    gap: float
    """Final loss above the paired run's without the mitigation; inf where it is not finite."""
    gap_under: float
    """The same with it."""
    above_counterfactual: float
    """Final loss with it above the counterfactual's; NaN where there is none."""
    interventions: str = ""
    """Applied interventions, with their numbers."""
    first: int | None = None
    """Step of the first of them."""
    errors: int = 0

    @property
    def repaired(self) -> bool:
        return self.gap_under < REPAIRED or self.above_counterfactual < REPAIRED

    @property
    def harmed(self) -> bool:
        return self.gap_under > self.gap + HARMED


def of_byte_gpt(args: argparse.Namespace) -> list[Row]:
    """Return the rows of the byte-level GPTs."""
    chosen = with_others(args.recipes or list(recipes()))
    wanted = chosen[: len(args.recipes) or None]
    folder = args.out / "byte_gpt"
    found = byte_gpt.run_all([watched_job(each) for each in chosen], folder, args.jobs)
    losses = {run.recipe.name: run.losses for run in found}
    became = {each.name: outcome(each, losses) for each in wanted}
    wanted = [each for each in wanted if became[each.name].label != "unclear"]
    rows = []
    for under in args.under:
        jobs = []
        for each in wanted:
            if under == "guard":
                jobs.append(byte_gpt.Job(each, config="guard", log_every=args.every))
            elif under == "qk_norm":
                jobs.append(byte_gpt.Job(replace(each, qk_norm=True)))
            else:
                jobs.append(byte_gpt.Job(each, settings=(("mitigation", under),)))
        for each, run in zip(wanted, byte_gpt.run_all(jobs, folder, args.jobs), strict=True):
            final, pair = _final(run.losses, each.steps), _final(losses[each.paired], each.steps)
            growth = losses.get(each.without_growth)
            rows.append(
                Row(
                    under,
                    "byte_gpt",
                    each.name,
                    became[each.name].label,
                    each.at_start,
                    _finite(_final(losses[each.name], each.steps) - pair),
                    _finite(final - pair),
                    math.nan if growth is None else _finite(final - _final(growth, each.steps)),
                    **_audited(run.interventions),
                    errors=sum(run.errors.values()),
                )
            )
    return rows


def of_own(args: argparse.Namespace) -> list[Row]:
    """Return the rows of the other testbed."""
    found = cases(own.chosen(args), args.out, args.jobs)
    rows = []
    for under in args.under:
        jobs: list[own.Job] = []
        for case in found:
            if under == "guard":
                jobs.append((case.recipe, "guard", args.every))
            elif under == "qk_norm":
                shape = replace(case.recipe.shape, qk_norm=True)
                jobs.append((replace(case.recipe, shape=shape), None, 1))
            else:
                jobs.append((case.recipe, None, 1, under))
        for case, run in zip(found, own.run_all(jobs, args.out, args.jobs), strict=True):
            rows.append(
                Row(
                    under,
                    "own",
                    case.recipe.name,
                    "healthy" if case.cause == "none" else case.cause,
                    case.at_start,
                    _finite(case.outcome.gap),
                    _finite(run.validation - case.paired.validation),
                    math.nan,
                    **_audited(run.records),
                    errors=sum(run.errors.values()),
                )
            )
    return rows


def _final(losses: np.ndarray, steps: int) -> float:
    """Return the loss at the end; inf where the run was given up."""
    return float(losses[-LAST:].mean()) if len(losses) == steps else math.inf


def _finite(gap: float) -> float:
    return gap if math.isfinite(gap) else math.inf


def _audited(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the interventions that an audit says were made."""
    made = [
        (each["intervention"], each["step"])
        for each in records
        if each["action"] == "skipped" or (each["action"] == "applied" and each["step"])
    ]
    counts = Counter(name for name, _ in made)
    return {
        "interventions": ", ".join(f"{name} x{count}" for name, count in counts.items()),
        "first": min((step for _, step in made), default=None),
    }


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """Summarise one mitigation."""
    text = {}
    attention = [each for each in rows if each.label == "attention"]
    for words, of in (
        ("failed by attention: repaired", attention),
        ("  wrong from the start", [each for each in attention if each.at_start]),
        ("  in mid-run", [each for each in attention if not each.at_start]),
        ("failed otherwise: repaired", [each for each in rows if each.label == "other"]),
    ):
        text[words] = share(sum(each.repaired for each in of), len(of))
    left = [each.gap_under for each in attention if math.isfinite(each.gap_under)]
    text["gap left of failures by attention"] = f"{np.median(left):.2f} (median)" if left else ""
    failed = [each for each in rows if each.label in ("attention", "other")]
    text["failed: harmed"] = _named([each for each in failed if each.harmed])
    healthy = [each for each in rows if each.label == "healthy"]
    touched = [each for each in healthy if each.first is not None]
    text["healthy: intervened in"] = share(len(touched), len(healthy))
    text["healthy: harmed"] = _named([each for each in healthy if each.harmed])
    cost = [each.gap_under - each.gap for each in healthy if math.isfinite(each.gap_under)]
    text["healthy: cost"] = f"{np.median(cost):+.3f} (median), {max(cost):+.3f}" if cost else ""
    return text


def _named(rows: Sequence[Row]) -> str:
    return ", ".join([str(len(rows)), *(each.run for each in rows)])


def main() -> int:
    """Print the tables and write the per-run one.

    Returns the exit status: 0, since aims are reported, not enforced.
    """
    parser = own.options(__doc__, INTERVALS)
    parser.add_argument("--testbed", choices=["own", "byte_gpt", "both"], default="both")
    parser.add_argument(
        "--recipes", nargs="+", default=(), metavar="NAME", help="recipes of byte_gpt"
    )
    parser.add_argument("--under", nargs="+", choices=UNDER, default=UNDER, help="mitigations")
    args = parser.parse_args()
    rows = [] if args.testbed == "own" else of_byte_gpt(args)
    rows += [] if args.testbed == "byte_gpt" else of_own(args)
    for testbed in dict.fromkeys(each.testbed for each in rows):
        of = [each for each in rows if each.testbed == testbed]
        _print_runs([each for each in of if each.under == args.under[0]], testbed)
        _print_summaries(of, testbed)
    if failing := [each.run for each in rows if each.errors]:
        print(f"stabmon failed inside in {', '.join(failing)}")
    path = args.out / f"recovery-{args.testbed}-every{args.every}.csv"
    write_rows(rows, path)
    return 0


def _print_runs(rows: Sequence[Row], testbed: str) -> None:
    table = Table(title=f"{testbed} under {rows[0].under}", title_justify="left")
    shown = ("run", "label", "gap", "gap_under", "above_counterfactual", "repaired", "harmed")
    shown += ("first", "interventions")
    for name in shown:
        table.add_column(name, overflow="fold")
    for each in sorted(rows, key=lambda each: each.label):
        if each.label != "healthy" or each.first is not None:
            values = [getattr(each, name) for name in shown]
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    Console(width=max(150, Console().width)).print(table)


def _print_summaries(rows: Sequence[Row], testbed: str) -> None:
    names = dict.fromkeys(each.under for each in rows)
    print_side_by_side(
        {name: summary([each for each in rows if each.under == name]) for name in names}, testbed
    )


if __name__ == "__main__":
    sys.exit(main())
