"""Train recipes and their variants side by side and keep the outcomes.

A stopped study continues from the kept runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.bench.kept_runs import pack_readings, train_missing, unpack_readings, write_whole
from tests.bench.testbed.recipes import KINDS, Recipe, recipes
from tests.bench.testbed.trainer import Run, train

Job = tuple[Recipe, str | None, int] | tuple[Recipe, str | None, int, str]
"""Recipe, the monitor's configuration (None for no monitor), its interval, and a mitigation."""


def options(description: str | None, intervals: Sequence[int] = ()) -> argparse.ArgumentParser:
    """Make the command line of a study; without ``intervals`` it does not choose one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=_count, default=2, help="runs of each kind")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        metavar="KIND",
        help="kinds of run",
    )
    if intervals:
        parser.add_argument(
            "--every",
            type=int,
            default=intervals[0],
            choices=intervals,
            help="steps between readings",
        )
    parser.add_argument(
        "--half",
        choices=["held-back", "tuned", "both"],
        default="held-back",
        help="which runs to report on",
    )
    parser.add_argument(
        "--jobs", type=_count, default=2, help="runs trained at a time, one thread each"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/testbed"), help="where runs and tables are kept"
    )
    return parser


def _count(text: str) -> int:
    """Parse a number of runs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def chosen(args: argparse.Namespace) -> list[Recipe]:
    """Return the recipes of some kinds, of one half or of both.

    Ends the program where there are none.
    """
    found = [recipe for recipe in recipes(args.each) if recipe.kind in args.only]
    found = [
        recipe
        for recipe in found
        if args.half == "both" or recipe.held_back == (args.half == "held-back")
    ]
    if not found:
        print(
            f"error: --each {args.each}: there is no {args.half} run, since every other one is: "
            "use at least 2",
            file=sys.stderr,
        )
        sys.exit(2)
    return found


def run_all(jobs: Sequence[Job], folder: Path, processes: int) -> list[Run]:
    """Train the runs missing in ``folder``, one thread each; return all in order."""
    paths = [folder / _name(*job) for job in jobs]
    train_missing(dict(zip(paths, jobs, strict=True)), _train_and_keep, processes)
    return [_read(path) for path in paths]


def kept(job: Job, folder: Path) -> Run:
    """Return a run that was trained before."""
    return _read(folder / _name(*job))


def _train_and_keep(job: Job, path: Path) -> None:
    run = train(*job)
    parts = (replace(run, readings=[]), pack_readings(run.readings))
    write_whole(path, pickle.dumps(parts))


def _read(path: Path) -> Run:
    run, readings = pickle.loads(path.read_bytes())
    return replace(run, readings=unpack_readings(readings))


def _name(recipe: Recipe, config: str | None, every: int, mitigation: str = "") -> str:
    how = [config, every, *([mitigation] if mitigation else [])]
    settings = json.dumps([asdict(recipe) | {"kind": ""}, *how], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return f"{recipe.name}-{config or 'plain'}-{every}-{digest}.pickle"
