"""Options of ``stabmon report``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from stabmon.cli.options import FailOn, Json


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of one call of ``stabmon report``; None where left out."""

    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Output folders of runs, or folders above them for the newest run below. "
            "FOLDER#1 is the first of several runs made in one folder.",
        ),
    ]
    out: Annotated[
        str | None,
        typer.Option(
            help="The page to write; RUN/stabmon/report.html if left out, report.html for several "
            "runs."
        ),
    ] = None
    fail_on: FailOn = "error"
    as_json: Json = False
