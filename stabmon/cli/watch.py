"""The command ``stabmon watch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stabmon.cli.options import FailOn, Json, check_fail_on


def watch(
    run_dir: Annotated[
        str, typer.Argument(help="A run's output folder, or one above runs: the newest is shown.")
    ] = ".",
    once: Annotated[bool, typer.Option("--once", help="Show the present state and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    fail_on: FailOn = "error",
    as_json: Json = False,
) -> None:
    """Show a run's issues, loss, layers and interventions, live from its records."""
    check_fail_on(fail_on)
    from stabmon.cli.watching.run import run

    if run(Path(run_dir), every=every, once=once, as_json=as_json, fail_on=fail_on):
        raise typer.Exit(1)
