"""The command ``stabmon train``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from stabmon.cli.options import Json

EVERY = 10.0
"""Seconds between two lines on the state of the trainings, where no terminal shows it."""


def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, such as those in configs/controllers.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings to lay over it.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Learn this file in place of the default corpus.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train attention controllers and compare them with controls of the same size.

    They are trained on a corpus, on a frozen base and together with it; the table is printed and
    kept in the run's folder. Ctrl-C ends the trainings; those that are done are kept.
    """
    from rich.console import Console

    from stabmon.cli.outputs import prove_folder
    from stabmon.cli.progress import working
    from stabmon.config import read_settings
    from stabmon.study.plan import StudySettings, tasks
    from stabmon.study.report import markdown, results_of, summary, tables
    from stabmon.study.study import run_study

    named = [f"corpus.text={json.dumps(text)}"] if text else []
    settings = read_settings(StudySettings, config, [*(overrides or ()), *named])
    prove_folder(settings.run_dir, "run_dir")
    try:
        with working("reading the text") as say:
            shown = say if sys.stderr.isatty() else at_intervals(_print)
            folder = run_study(settings, _print, shown)
    except KeyboardInterrupt:
        done = sum(map(len, results_of(Path(settings.run_dir)).values()))
        _print(
            f"{done} of {len(tasks(settings))} trainings are done and kept in {settings.run_dir}: "
            "go on with resume=true"
        )
        raise
    found = summary(settings, folder)
    (folder / "table.md").write_text(markdown(found, len(settings.seeds)))
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        print(json.dumps({"schema_version": 1, "run_dir": str(folder), "tables": found}))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables(found, len(settings.seeds)):
        console.print(table)
    console.print(f"records in {folder}", highlight=False, soft_wrap=True)


def at_intervals(show: Callable[[str], None], every: float = EVERY) -> Callable[[str], None]:
    """Return a function that shows a line, and drops those that follow too soon.

    Args:
        show: gets the lines.
        every: least seconds between two of them.

    Example:
        >>> say = at_intervals(print)
        >>> say("step 1 of 100"), say("step 2 of 100")
        step 1 of 100
        (None, None)
    """
    due = 0.0

    def say(line: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + every
            show(line)

    return say


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
